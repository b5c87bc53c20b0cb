"""What the chat template is given: by an option or by the clock, and from then on by the record."""

from __future__ import annotations

import json
import shutil

import pytest
from clock import TEMPLATE, set_day
from toy_run import train_flags
from toy_trainer import make_trainer

from softprompt_fast.cli.main import main
from softprompt_fast.teacher.teacher import Teacher

STEPS = {"max_steps": 4, "save_steps": 2}
WEIGHTS = "adapter_model.safetensors"
NO_THINKING = '{"enable_thinking": false}'
FIRST_DAY, NEXT_DAY = "2026-11-27", "2026-11-28"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Runs ``train`` on a model with TEMPLATE; the directory of the run."""
    train_flags(tmp_path)  # makes the model
    (tmp_path / "model/chat_template.jinja").write_text(TEMPLATE)
    set_day(monkeypatch, FIRST_DAY)

    def run(output="run", *more, code=0, **changes):
        flags = train_flags(tmp_path, output, **{**STEPS, "eval_file": None, **changes})
        assert main([*flags, *more]) == code
        return tmp_path / output

    return run


@pytest.fixture
def asked(monkeypatch):
    """The texts of the questions that ``generate`` asked."""
    texts: list[str] = []

    def stream(model, tokenizer, query, show, **options):
        texts.append(tokenizer.decode(query.plain))

    monkeypatch.setattr("softprompt_fast.cli.saved_prompt.stream", stream)
    return texts


@pytest.fixture
def no_teacher(monkeypatch):
    """From now on the teacher must not be asked."""

    def forbid():
        def answer(*args, **options):
            raise AssertionError("the teacher was asked")

        monkeypatch.setattr(Teacher, "answer", answer)

    return forbid


def facts(directory) -> dict:
    return json.loads((directory / "soft_prompt.json").read_text())["base"]


def interrupted(run):
    """The run as it was after its first checkpoint."""
    shutil.rmtree(run / "checkpoint-4")
    (run / WEIGHTS).unlink()
    return run


def test_a_run_goes_on_the_next_day_as_on_the_first(train, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    run = train(teacher_cache=cache)
    assert facts(run)["chat_template_date"] == FIRST_DAY
    weights = (run / WEIGHTS).read_bytes()
    without_cache = train("without")
    set_day(monkeypatch, NEXT_DAY)
    assert (train("later") / WEIGHTS).read_bytes() != weights
    interrupted(without_cache)
    train("without")
    assert (without_cache / WEIGHTS).read_bytes() == weights
    written = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    interrupted(run)
    train(teacher_cache=cache)
    assert (run / WEIGHTS).read_bytes() == weights
    # The teacher's work of yesterday serves other runs of today.
    another = train("another", teacher_cache=cache)
    assert facts(another)["chat_template_date"] == FIRST_DAY
    assert (another / WEIGHTS).read_bytes() == weights
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == written


def test_a_prompt_is_used_with_what_it_was_trained_with(train, asked, monkeypatch, capsys):
    run = train(chat_template_kwargs=NO_THINKING, teacher_cache=None)
    assert facts(run)["chat_template_kwargs"] == {"enable_thinking": False}
    set_day(monkeypatch, NEXT_DAY)
    command = ["generate", f"--prompt_dir={run}", "Hi"]
    capsys.readouterr()
    assert main(command) == 0
    assert main([*command, "--chat_template_kwargs", NO_THINKING]) == 0
    assert "was trained with" not in capsys.readouterr().err
    assert main([*command, "--chat_template_kwargs={}"]) == 0
    note = "Note: the soft prompt was trained with chat_template_kwargs {'enable_thinking': False}"
    assert note in capsys.readouterr().err
    start = "<|start|>user\n27 Nov 2026: Hi<|end|>\n<|start|>assistant\n"
    thought = "<think>\n\n</think>\n\n"
    assert asked == [start + thought, start + thought, start]


def test_a_run_with_other_variables_is_another_run(train, no_teacher, tmp_path, capsys):
    cache = tmp_path / "cache"
    run = train(chat_template_kwargs=NO_THINKING, teacher_cache=cache)
    config = tmp_path / "config.yaml"
    config.write_text("chat_template_kwargs: {enable_thinking: false}\n")
    no_teacher()
    capsys.readouterr()
    train("run", "--chat_template_kwargs", '{ "enable_thinking":false}', teacher_cache=cache)
    train("run", f"--config={config}", teacher_cache=cache)
    assert capsys.readouterr().out.count("nothing is left to train") == 2
    train(code=1, teacher_cache=cache)
    difference = "chat_template_kwargs: {'enable_thinking': False} there, 'default' now"
    assert f"holds a run with other options: {difference}" in capsys.readouterr().err
    # Nor is its teacher, or its checkpoint, that of others.
    train("other", code=1, teacher_cache=cache, chat_template_kwargs='{"enable_thinking": true}')
    difference = "{'enable_thinking': False} there, {'enable_thinking': True} now"
    message = capsys.readouterr().err
    assert (
        f"is stale: teacher_cache.json was made with chat_template_kwargs: {difference}" in message
    )
    train("third", code=1, resume_from_checkpoint=run / "checkpoint-2")
    message = capsys.readouterr().err
    assert "error: The soft prompt was trained with chat_template_kwargs {'enable_th" in message


def test_a_run_is_not_continued_with_another_template(train, no_teacher, tmp_path, capsys):
    run = interrupted(train())
    no_teacher()
    template = tmp_path / "model/chat_template.jinja"
    template.write_text(TEMPLATE.replace("assistant", "helper"))
    before = sorted(path.name for path in run.iterdir())
    train(code=1)
    message = capsys.readouterr().err
    assert "error: The soft prompt was trained with another chat template than the model" in message
    assert sorted(path.name for path in run.iterdir()) == before
    template.write_text(TEMPLATE)
    with pytest.raises(AssertionError, match="the teacher was asked"):
        train()
    with pytest.raises(AssertionError, match="the teacher was asked"):
        template.write_text(CHANGED := TEMPLATE.replace("assistant", "helper"))
        assert CHANGED != TEMPLATE
        train("run", "--overwrite_output_dir")


def test_a_trainer_goes_on_with_its_own_variables_only(tmp_path):
    trainer = make_trainer(tmp_path)
    prompt = trainer.model.prompt
    prompt.save_pretrained(tmp_path / "saved")
    trainer.load_prompt(tmp_path / "saved")
    prompt.base["chat_template_kwargs"] = {"enable_thinking": False}
    with pytest.raises(
        ValueError, match="trained with chat_template_kwargs None, and not with {'e"
    ):
        trainer.load_prompt(tmp_path / "saved")


def test_a_prompt_of_before_dates_were_recorded_is_used_as_ever(train, asked, monkeypatch, capsys):
    run = train()
    file = run / "soft_prompt.json"
    prompt = json.loads(file.read_text())
    del prompt["base"]["chat_template_date"]
    file.write_text(json.dumps(prompt))
    set_day(monkeypatch, NEXT_DAY)
    assert main(["generate", f"--prompt_dir={run}", "Hi"]) == 0
    assert "28 Nov 2026" in asked[0]
    assert "is given 2026-11-28 from now on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["train", "sweep", "synthesize", "generate", "chat", "eval", "export"]
)
def test_what_no_template_can_be_given_is_wrong_usage(train, command, tmp_path, capsys):
    needed = {"export": ["--to=safetensors", f"--output_dir={tmp_path / 'out'}"]}
    flags = [f"--prompt_dir={tmp_path}", *needed.get(command, [])]
    if command in ("train", "sweep"):
        flags = train_flags(tmp_path)[1:]
    if command == "synthesize":
        flags = [f"--{n}={tmp_path / n}" for n in ("model", "output_dir", "context_file")]
    for value, problem in (
        ("{", "is no JSON"),
        ("[]", "must be a JSON object"),
        ('{"messages": []}', "cannot set 'messages'"),
    ):
        assert main([command, *flags, f"--chat_template_kwargs={value}"]) == 2
        assert f"error: chat_template_kwargs {problem}" in capsys.readouterr().err
