"""Runs with one fault each: what is said while they train, and by ``doctor`` afterwards."""

from __future__ import annotations

import json
import shutil

import pytest
from toy import CHAT_TEMPLATE
from toy_run import CONTEXT, QUESTIONS, train_flags

from softprompt_fast.cli.main import main
from softprompt_fast.training.trainer import SoftPromptTrainer

KINDS = (
    *("nothing to compress", "cut answers", "vanishing gradient", "learning rate too high"),
    *("learning rate too low", "gradient always clipped", "not learning", "overfitted"),
)
DEFAULT = f"<|start|>system\n{CONTEXT}<|end|>\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With answers in the data, so that none is cut; and a model whose template opens with the
    context where it is given no other."""
    folder = tmp_path_factory.mktemp("doctor")
    train_flags(folder)
    lines = [{"prompt": q, "completion": q[::-1]} for q in QUESTIONS]
    (folder / "given.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = shutil.copytree(folder / "model", folder / "model_with_default")
    template = f"{{% if messages[0]['role'] != 'system' %}}{DEFAULT}{{% endif %}}{CHAT_TEMPLATE}"
    (model / "chat_template.jinja").write_text(template)
    return folder


def flags(folder, name, **changes):
    own = dict(train_file=folder / "given.jsonl", max_steps=14, save_steps=7, learning_rate=0.1)
    return train_flags(folder, name, **own | dict(logging_steps=2, eval_file=None) | changes)


FAULTS = {
    "healthy": ({}, None),
    "low": (dict(learning_rate=1e-7), "learning rate too low"),
    "high": (dict(learning_rate=1e4), "learning rate too high"),
    "clipped": (dict(max_grad_norm=1e-3), "gradient always clipped"),
    "nothing": (dict(model="model_with_default"), "nothing to compress"),
    "cut": (dict(train_file="train.jsonl", max_new_tokens=2), "cut answers"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_said_and_no_other(folder, capsys, name):
    changes, kind = FAULTS[name]
    paths = {n: folder / changes[n] for n in ("model", "train_file") if n in changes}
    assert main(flags(folder, name, **changes | paths)) == 0
    trained = capsys.readouterr()
    assert main(["doctor", str(folder / name)]) == 0
    out = capsys.readouterr().out
    assert [each for each in KINDS if f"{each}: " in out] == ([] if kind is None else [kind])
    assert ("Nothing suspicious." in out) == (kind in (None, "cut answers"))
    if kind in (None, "cut answers"):
        assert not [each for each in KINDS if f"{each}: " in trained.err + trained.out]
    if kind == "cut answers":
        assert "were cut there; --max_new_tokens takes more" in trained.err
    elif kind is not None:
        assert trained.err.count(f"{kind}: ") == 1
        assert trained.out.count(f"What stands out: {kind}: ") == 1


@pytest.fixture
def run(folder, tmp_path):
    """A finished run, to be changed."""
    if not (folder / "kept/run.json").exists():
        assert main(flags(folder, "kept", max_steps=13, save_steps=6, save_total_limit=3)) == 0
    return shutil.copytree(folder / "kept", tmp_path / "kept")


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def unfinished(run):
    """What kill -9 leaves."""
    rewrite(run / "run.json", status="training")
    for name in ("training_log.json", "adapter_model.safetensors", "soft_prompt.json"):
        (run / name).unlink()
    shutil.rmtree(run / "checkpoint-13")


def test_a_killed_run_is_explained_from_its_last_checkpoint(run, capsys):
    unfinished(run)
    assert main(["doctor", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{run}: not finished" in out
    assert "12 of 13, 1 of warm-up" in out
    assert "4 virtual tokens" in out
    assert "Nothing suspicious." in out

    (run / "checkpoint-12/optimizer.pt").write_bytes(b"damaged")
    assert main(["doctor", str(run)]) == 0
    out = capsys.readouterr().out
    assert "6 of 13" in out
    assert "Not looked at: Checkpoint skipped: " in out
    assert "optimizer.pt is not the file that was saved." in out
    assert "how it learns, for it has 5 steps after warm-up, and 10 are needed." in out


def test_held_out_queries_are_looked_at(run, capsys):
    (run / "evaluation.json").write_text(json.dumps({"kl_recovered": -0.5}))
    assert main(["doctor", str(run)]) == 0
    out = capsys.readouterr().out
    assert "-50% on held-out ones" in out
    assert "overfitted: " in out
    for damaged in ("{", "[1]", "{}", '{"kl_recovered": "\\u001b[2J"}', "[" * 100_000):
        (run / "evaluation.json").write_text(damaged)
        assert main(["doctor", str(run)]) == 0
        out = capsys.readouterr().out
        assert "Not looked at: " in out
        assert f"{run}/evaluation.json" in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("training_log.json", "{", "training_log.json is not JSON"),
        ("training_log.json", "[]", "training_log.json must hold a JSON object"),
        ("training_log.json", "{}", "must have format_version 1: got None"),
        ("training_log.json", dict(format_version=2), "must have format_version 1: got 2"),
        ("training_log.json", dict(steps={}), "is damaged: see 'steps'"),
        ("training_log.json", dict(steps=[{"step": 1}]), "is damaged: see 'steps'"),
        ("training_log.json", dict(max_steps=None), "is damaged: see 'max_steps'"),
        ("training_log.json", dict(loss_at_end=float("nan")), "is damaged: see 'loss_at_end'"),
        ("training_log.json", dict(prompt_change=10**400), "is damaged: see 'prompt_change'"),
        ("training_log.json", {"\x1b[2J": 1}, "is damaged: see '\\x1b[2J'"),
        ("training_log.json", None, "has no training_log.json, and no whole checkpoint with one"),
        ("run.json", "\xff", "run.json is not JSON"),
        ("run.json", None, "holds no run of softprompt-fast: it has no run.json"),
    ],
)
def test_a_damaged_run_is_named(run, capsys, name, content, message):
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    if isinstance(content, dict):
        rewrite(run / name, **content)
    elif content is None:
        (run / name).unlink()
    else:
        (run / name).write_bytes(content.encode("latin-1"))
    assert main(["doctor", str(run)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert str(run) in captured.err


def test_what_a_run_says_of_itself_cannot_drive_the_terminal(run, capsys):
    rewrite(run / "run.json", inputs={"model": "\x1b[2J[red]\u202egnp\nx"}, seconds="\x1b")
    rewrite(run / "training_log.json", objective="\x07")
    (run / "adapter_model.safetensors").unlink()
    assert main(["doctor", str(run)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J[red]\\u202egnp x" in out
    assert "\\x07" in out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert "Not looked at: " in out and "no adapter_model.safetensors" in out


def test_a_log_that_ends_in_a_loss_that_is_not_finite(folder, capsys):
    """Written where training stops, though no checkpoint knows of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SoftPromptTrainer,
            "training_step",
            stops_after(5, SoftPromptTrainer.training_step),
        )
        assert main(flags(folder, "stopped")) == 1
    assert main(["doctor", str(folder / "stopped")]) == 0
    out = capsys.readouterr().out
    assert "5 of 14" in out
    assert "learning rate too high: The loss was not finite after step 5" in out


def stops_after(steps, training_step):
    def step(self, *args, **options):
        if self.state.global_step == steps:
            raise FloatingPointError("The loss is nan")
        return training_step(self, *args, **options)

    return step


@pytest.mark.parametrize("argument", ["", "absent", "a\x1b[2J"])
def test_what_is_no_directory_is_named(capsys, argument):
    assert main(["doctor", argument]) == 1
    err = capsys.readouterr().err
    assert "is no directory: give the output_dir of a run" in err
    assert "\x1b" not in err
    assert main(["doctor"]) == 2
