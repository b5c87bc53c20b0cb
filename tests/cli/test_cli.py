"""The command line: what it does, and what it says when it cannot."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from toy_run import QUESTIONS, start, train_flags, wait_for, write_lines

from softprompt_fast.cli import saved_prompt
from softprompt_fast.cli.config_file import config_arguments
from softprompt_fast.cli.main import main
from softprompt_fast.training.callbacks import StopOnSignal
from softprompt_fast.training.checkpoints import last_good_checkpoint
from softprompt_fast.training.run_directory import RunDirectory
from softprompt_fast.training.trainer import SoftPromptTrainer
from softprompt_fast.utils.console import printable


@pytest.fixture
def run(capsys):
    def run_command(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def error_of(result) -> str:
    """The one message of a run that could not be done."""
    code, _out, err = result
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 1
    assert len(errors) == 1
    assert "Traceback" not in err
    return errors[0].removeprefix("error: ")


def usage_error_of(result) -> str:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err.removeprefix("error: ").rstrip()


# What it does


def test_train_eval_generate(run, tmp_path):
    code, out, err = run(*train_flags(tmp_path))
    assert code == 0, err
    assert "Trained 6 steps" in out
    assert f"(4 virtual tokens) is in {tmp_path / 'run'}" in out
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"

    code, out, err = run("eval", "--prompt_dir", tmp_path / "run", "--num_samples=2")
    assert code == 0, err
    assert f"Written to {tmp_path / 'run/evaluation.json'}" in out
    assert "3 held-out queries" in out
    assert "KL recovered" in out
    report = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert report["objective"] == "kl"
    assert report["max_new_tokens"] == 7
    assert len(report["answers"]) == 2

    code, out, err = run(
        "generate", "--prompt_dir", tmp_path / "run", report["answers"][0]["query"]
    )
    assert code == 0, err
    assert out.strip() == printable(report["answers"][0]["soft prompt"]).strip()


def test_a_question_from_stdin(run, finished, monkeypatch):
    prompt_dir = ("generate", "--prompt_dir", finished / "run")
    expected = run(*prompt_dir, "When?")[:2]
    monkeypatch.setattr("sys.stdin", io.StringIO("When?\n"))
    assert run(*prompt_dir)[:2] == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert error_of(run(*prompt_dir)) == "the question is empty"


def test_the_same_command_again_trains_nothing(run, tmp_path):
    flags = train_flags(tmp_path, max_steps=2)
    run(*flags)
    weights = tmp_path / "run/adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    code, out, _err = run(*flags)
    assert code == 0
    assert "nothing is left to train" in out
    assert weights.stat().st_mtime_ns == before

    message = error_of(run(*flags, "--learning_rate=0.5", "--beta=1"))
    assert f"output_dir {tmp_path / 'run'} holds a run with other options: " in message
    assert "beta: 'default' there, 1.0 now; learning_rate: 'default' there, 0.5 now." in message
    assert "--overwrite_output_dir" in message
    assert weights.stat().st_mtime_ns == before

    code, out, _err = run(*flags, "--learning_rate=0.5", "--overwrite_output_dir")
    assert code == 0
    assert "Trained 2 steps" in out
    assert weights.stat().st_mtime_ns != before


def test_changed_data_is_another_run(run, tmp_path):
    flags = train_flags(tmp_path, max_steps=2)
    run(*flags)
    write_lines(tmp_path / "train.jsonl", ["Another?"])
    assert "other options: train_file_sha256: " in error_of(run(*flags))


@pytest.mark.processes
@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_a_signal_saves_after_the_step(tmp_path, name):
    number = signal.Signals[name]
    flags = train_flags(tmp_path, max_steps=100_000, save_steps=10)
    process = start(flags)
    wait_for(tmp_path / "run/checkpoint-10/manifest.json", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{name}: saving after this step" in err
    assert "Traceback" not in err
    step = int(out.split("Stopped after step ")[1].split()[0])
    assert last_good_checkpoint(tmp_path / "run") == tmp_path / f"run/checkpoint-{step}"
    assert "The same command goes on from there." in out


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ([], "The same command goes on"),
        (["--overwrite_output_dir"], "The same command without --overwrite_output_dir goes on"),
    ],
    ids=["plain", "overwrite"],
)
def test_the_hint_goes_on_and_does_not_start_anew(run, tmp_path, monkeypatch, flag, hint):
    def stop_at_once(self, args, state, control, **kwargs):
        self.received = signal.SIGINT
        control.should_save = control.should_training_stop = True

    monkeypatch.setattr(StopOnSignal, "on_step_end", stop_at_once)
    code, out, _ = run(*train_flags(tmp_path), *flag)
    assert code == 130
    assert "Stopped after step 1 of 6" in out
    assert f"{hint} from there." in out


def test_ctrl_c_while_libraries_load_is_quiet(tmp_path, monkeypatch):
    package = tmp_path / "transformers"
    package.mkdir()
    (package / "__init__.py").write_text("raise KeyboardInterrupt")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    process = start(["generate", "--prompt_dir=x", "hello"])
    assert process.communicate() == ("", "")
    assert process.returncode == 130


def test_data_from_a_pipe_is_read_once(run, tmp_path):
    flags = train_flags(tmp_path, max_steps=1)
    content = (tmp_path / "train.jsonl").read_bytes()
    reading, writing = os.pipe()
    os.write(writing, content)
    os.close(writing)
    assert run(*flags, f"--train_file=/dev/fd/{reading}")[0] == 0
    os.close(reading)
    options = json.loads((tmp_path / "run/run.json").read_text())["options"]
    assert options["train_file_sha256"] == hashlib.sha256(content).hexdigest()
    assert "nothing is left to train" in run(*flags)[1]  # the file has the same content


def test_eval_knows_the_context_of_the_training(run, tmp_path):
    run(*train_flags(tmp_path, max_steps=1))
    context = tmp_path / "context.txt"
    command = ("eval", "--num_samples=0", "--prompt_dir", tmp_path / "run")
    evaluation = tmp_path / "run/evaluation.json"
    assert run(*command)[0] == 0
    assert json.loads(evaluation.read_text())["context_of_training"] is True
    context.write_text("Closed for good.")
    changed = f"{context} is not the context that the prompt was trained on"
    message = error_of(run(*command))
    assert message.startswith(f"{changed}: it has changed since.")
    assert f"pass --context_file={context}" in message
    code, _, err = run(*command, f"--context_file={context}")
    assert code == 0
    assert f"Note: {changed}" in err
    assert json.loads(evaluation.read_text())["context_of_training"] is False


def test_the_dtype_of_the_training_is_taken_over(run, tmp_path, monkeypatch):
    run(*train_flags(tmp_path, max_steps=1, dtype="bfloat16"))
    load, loaded = saved_prompt.load_model, []

    def spy(*args, **options):
        loaded.append(options["dtype"])
        return load(*args, **options)

    monkeypatch.setattr(saved_prompt, "load_model", spy)
    for more in ([], ["--dtype=float32"]):
        assert run("generate", "Hi", "--prompt_dir", tmp_path / "run", *more)[0] == 0
    assert loaded == ["bfloat16", "float32"]


def test_a_model_is_the_same_by_any_path(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = train_flags(tmp_path, model="model", max_steps=1)
    assert run(*flags)[0] == 0
    assert "nothing is left to train" in run(*flags, f"--model={tmp_path / 'model'}")[1]


def test_the_table_is_shown_even_if_it_cannot_be_written(run, finished_run, monkeypatch):
    file = finished_run / "evaluation.json"
    file.mkdir()
    result = run("eval", "--num_samples=1", "--prompt_dir", finished_run)
    assert "KL recovered" in result[1]
    assert error_of(result).startswith(f"{file}: cannot write ")
    file.rmdir()
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main(["eval", "--num_samples=1", "--prompt_dir", str(finished_run)]) == 0
    ascii_only.seek(0)
    assert "\\xb1" in ascii_only.read()


def test_evaluation_during_training(run, tmp_path):
    code, out, _err = run(*train_flags(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1))
    assert code == 0
    assert "loss on eval_file" in out


# Usage: exit code 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (
            ["train", "--leanring_rate", "1"],
            "unknown flag '--leanring_rate'; did you mean --learning_rate?",
        ),
        (["train", "--num-virtual-token=1"], "did you mean --num_virtual_tokens?"),
        (["generate", "--zzz"], "unknown flag '--zzz'"),
        (["eval"], "the following arguments are required: --prompt_dir"),
        (["train", "--model=m", "--train_file=t"], "arguments are required: --output_dir"),
        (["train", "--objective=kll"], "argument --objective: invalid choice: 'kll' (choose from"),
        (["train", "--max_steps=many"], "argument --max_steps/--max-steps: invalid int value"),
        (["train", "--config"], "expected one argument. See softprompt-fast train --help"),
        (["train", "--config="], "--config is empty: give a path, or leave it out"),
        (["generate", "--prompt_dir=x", "a\udcff"], "question is not UTF-8: see character 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(run, arguments, message):
    assert message in usage_error_of(run(*arguments))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_virtual_tokens=0", "num_virtual_tokens must be >= 1"),
        ("--beta=2", "beta must be in [0, 1]: got 2.0"),
        ("--train_file=", "--train_file is empty"),
        ("--context_file=", "--context_file is empty"),
        ("--per_device_train_batch_size=0", "size must be a finite number >= 1: got 0"),
        ("--per_device_eval_batch_size=-1", "size must be a finite number >= 1: got -1"),
        ("--gradient_accumulation_steps=0", "steps must be a finite number >= 1: got 0"),
        ("--teacher_batch_size=0", "teacher_batch_size must be a finite number >= 1"),
        ("--max_new_tokens=0", "max_new_tokens must be a finite number >= 1"),
        ("--workspace_mib=0", "workspace_mib must be a finite number >= 1"),
        ("--learning_rate=nan", "learning_rate must be a finite number >= 0: got nan"),
        ("--learning_rate=-1", "learning_rate must be a finite number >= 0"),
        ("--max_grad_norm=inf", "max_grad_norm must be a finite number >= 0"),
        ("--weight_decay=nan", "weight_decay must be a finite number >= 0"),
        ("--max_steps=-1 --num_train_epochs=nan", "num_train_epochs must be a finite number above"),
        ("--max_steps=0 --num_train_epochs=0", "num_train_epochs must be a finite number above 0"),
        ("--prompt_seed=99999999999999999999", "prompt_seed must fit into 64 bits"),
        ("--dtype=float8", "dtype must be one of auto, float32"),
        ("--backend=foo", "backend must be "),
        ("--backend=cuda", "backend 'cuda' cannot be used: "),
        ("--report_to=azure_ml", "report_to azure_ml: there is no such package installed"),
        ("--report_to=foo", "report_to foo: there is no such package installed"),
        (
            "--optim=schedule_free_adamw",
            "optim schedule_free_adamw, optim_args None: You need to install",
        ),
        ("--lr_scheduler_type=warmup_stable_decay", "missing 1 required positional argument"),
        ("--save_strategy=best", "save_strategy best needs --eval_strategy and"),
        ("--metric_for_best_model=f1", "metric_for_best_model must be loss: got 'f1'"),
        ("--save_only_model", "save_only_model is not supported"),
        ("--push_to_hub", "push_to_hub is not supported"),
        ("--use_liger_kernel", "use_liger_kernel is not supported"),
        ("--deepspeed=x.json", "deepspeed is not supported"),
        ("--neftune_noise_alpha=5", "neftune_noise_alpha is not supported"),
        ("--overwrite_output_dir --resume_from_checkpoint=x", "give one"),
    ],
)
def test_wrong_values_are_said_before_the_model_loads(run, no_model, flags, message):
    assert message in usage_error_of(run(*no_model(), *flags.split()))


def test_evaluation_needs_queries(run, no_model):
    message = usage_error_of(run(*no_model(eval_file=None, eval_strategy="epoch")))
    assert message == "eval_strategy and eval_on_start need --eval_file"


def test_help_is_short_and_names_the_commands(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in ("train", "eval", "generate", "--config"))
    assert run()[0] == 2


def test_the_usage_of_generate_has_a_question(run, capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert '[--flags] ["QUESTION"]' in capsys.readouterr().out


# Config files


def test_a_config_file_is_a_set_of_flags(run, tmp_path, monkeypatch):
    train_flags(tmp_path)
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs/run.yaml"
    config.write_text(
        "model: ../model\ncontext_file: ../context.txt\ntrain_file: ../train.jsonl\n"
        "output_dir: out\nnum_virtual_tokens: 3\nlearning_rate: 2e-2\nmax_steps: 9\n"
        "disable_tqdm: true\nper_device_train_batch_size: 2\nmax_new_tokens: 5\neval_file:\n"
    )
    monkeypatch.chdir("/")
    code, out, err = run("train", "--config", config, "--max_steps", 2)
    assert code == 0, err
    assert "Trained 2 steps" in out
    assert "(3 virtual tokens)" in out
    written = json.loads((tmp_path / "configs/out/run.json").read_text())
    assert written["options"]["learning_rate"] == 0.02
    assert written["inputs"]["model"] == str(tmp_path / "model")
    assert written["inputs"]["eval_file"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", ": unknown key 'learning_rat'; did you mean learning_rate?"),
        ("a: 1\nb: [1, 2\n", ":3:1: bad YAML: expected ',' or ']'"),
        ("model: x\nmodel: y", ":2:1: bad YAML: key 'model' twice"),
        ("- model", ': a config file holds lines of "name: value"'),
        ("", ': a config file holds lines of "name: value"'),
        (
            "model: !!python/object/apply:os._exit [3]",
            ":1:8: bad YAML: no tag is allowed here: got 'tag:yaml.org,2002:python/object/",
        ),
        ("objective: kll", "argument --objective: invalid choice: 'kll'"),
        ("3: 4", ": unknown key '3'"),
        ("? [a]\n: 1", ":1:3: bad YAML: a key must be a name"),
        ("2020-01-01: 1", ": unknown key '2020-01-01'"),
        ("beta: !!int foo", "argument --beta: invalid float value: 'foo'"),
        ("max_steps: 2020-01-01", "argument --max_steps/--max-steps: invalid int value: '2020-"),
        ("objective: no", "argument --objective: invalid choice: 'no'"),
        ("model: m\nlr_scheduler_kwargs: &a {b: *a}", ":2:1: bad YAML: 'lr_scheduler_kwargs' is "),
        ("beta: !!set {a}", ":1:7: bad YAML: no tag is allowed here: got 'tag:yaml.org,2002:set'"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_config_files(run, tmp_path, text, message):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    error = usage_error_of(run("train", "--config", config))
    assert message in error
    assert message.startswith("argument") or error.startswith(str(config))


def test_what_a_config_file_says_stays_as_written(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        "save_strategy: no\nresume_from_checkpoint: a/checkpoint-1\ntrain_file: ~nouser/x\n"
        'lr_scheduler_kwargs: {num_cycles: 2, last: "2", min_lr: 1e-3, on: [true, ~]}\n'
        "run_name: 2020-01-01\nreport_to: [none, 1]\neval_file: ~\n"
    )
    names = "save_strategy resume_from_checkpoint train_file lr_scheduler_kwargs run_name report_to"
    assert config_arguments(str(config), [*names.split(), "eval_file"]) == [
        "--save_strategy=no",
        f"--resume_from_checkpoint={tmp_path}/a/checkpoint-1",
        f"--train_file={tmp_path}/~nouser/x",
        '--lr_scheduler_kwargs={"num_cycles": 2, "last": "2", "min_lr": 0.001, "on": [true, null]}',
        "--run_name=2020-01-01",
        *("--report_to", "none", "1"),
    ]


def test_a_question_is_no_key(run, tmp_path):
    (tmp_path / "c.yaml").write_text("prompt_dir: x\nquestion: hi")
    message = usage_error_of(run("generate", "--config", tmp_path / "c.yaml"))
    assert message == f"{tmp_path / 'c.yaml'}: unknown key 'question'"


def test_a_missing_config_file(run, tmp_path):
    missing = tmp_path / "no.yaml"
    assert error_of(run("train", "--config", missing)) == f"{missing}: No such file or directory"


# What is said before the model loads


@pytest.fixture
def no_model(tmp_path):
    """Flags whose model does not exist: an error about anything else came before it was loaded."""

    def flags(**changes):
        return train_flags(tmp_path, **{"model": "./no/such/model", **changes})

    return flags


def test_a_missing_model_is_named_and_nothing_is_left(run, tmp_path, no_model):
    assert error_of(run(*no_model())) == "model directory './no/such/model' does not exist"
    assert not (tmp_path / "run/run.json").exists()
    assert run(*train_flags(tmp_path, max_steps=1))[0] == 0


def test_an_occupied_output_directory(run, tmp_path, no_model):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").touch()
    for more in ([], ["--overwrite_output_dir"]):
        message = error_of(run(*no_model(), *more))
        assert f"output_dir {tmp_path / 'run'} is occupied: it holds 'thesis.tex'" in message
    assert (tmp_path / "run/thesis.tex").exists()


def test_a_first_write_that_was_killed_is_not_in_the_way(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.run.json.123.tmp").write_text('{"format')
    assert run(*train_flags(tmp_path, max_steps=1))[0] == 0
    assert not (tmp_path / "run/.run.json.123.tmp").exists()


def test_nothing_to_train_on(run, no_model):
    message = error_of(run(*no_model(dataloader_drop_last=True, per_device_train_batch_size=100)))
    assert message == (
        "dataloader_drop_last leaves nothing to train on: 5 queries are less than a batch of 100. "
        "Lower per_device_train_batch_size."
    )


def test_a_checkpoint_that_is_not_there(run, no_model):
    message = error_of(run(*no_model(resume_from_checkpoint="/no/such")))
    assert message == "checkpoint /no/such does not exist, or is no directory."


def test_an_output_directory_that_cannot_be_written(run, tmp_path, no_model):
    (tmp_path / "file").touch()
    where = tmp_path / "file/run"
    message = error_of(run(*no_model(output_dir=where)))
    assert message == f"cannot write to output_dir {where}: Not a directory"


def test_an_output_directory_in_use(run, tmp_path, no_model):
    with RunDirectory(tmp_path / "run", {}, inputs={}, overwrite=False).owned():
        message = error_of(run(*no_model()))
    assert message == f"output_dir {tmp_path / 'run'} is in use: another process trains there"


def test_bad_data(run, tmp_path, no_model):
    flags = no_model()
    data = tmp_path / "train.jsonl"
    assert error_of(run(*no_model(train_file=tmp_path / "x"))).startswith(
        f"{tmp_path / 'x'}: No su"
    )
    data.write_text('{"prompt": }\n')
    assert f"{data}:1:12: bad JSON: Expecting value" in error_of(run(*flags))
    write_lines(data, QUESTIONS)
    message = error_of(run(*no_model(context_file=None)))
    assert f"{data}:1: no field 'context', and no --context_file" in message


# What goes wrong later


def test_too_long_for_the_model(run, tmp_path):
    flags = train_flags(tmp_path)
    write_lines(tmp_path / "train.jsonl", ["short", "long " * 95])
    message = error_of(run(*flags))
    assert message.startswith(f"{tmp_path / 'train.jsonl'}:2: context and query take ")
    assert "the answer up to 7, but the model has 512 positions" in message


def test_a_full_disk_names_the_directory(run, tmp_path):
    flags = train_flags(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # of each file, in bytes
    try:
        result = run(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error_of(result).startswith(f"{tmp_path / 'run'}: cannot write ")
    assert run(*flags)[0] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": None}, "inputs must be of type dict, got None"),
        ({"options": []}, "options must be of type dict, got []"),
        ({"inputs": {"max_new_tokens": "x"}}, "max_new_tokens must be of type int, got 'x'"),
        ({"inputs": {"model": 3}}, "model must be of type str, got 3"),
    ],
    ids=str,
)
def test_a_damaged_run_file_is_named(run, tmp_path, change, message):
    file = tmp_path / "run.json"
    file.write_text(json.dumps(change))
    for command in (["eval"], ["generate", "hello"]):
        error = error_of(run(*command, "--prompt_dir", tmp_path))
        assert error == f"{file} is damaged: {message}."


def test_cut_answers_are_counted(run, tmp_path):
    code, _, err = run(*train_flags(tmp_path, max_steps=1, max_new_tokens=1))
    assert code == 0
    assert "5 of 5 answers of the teacher reached max_new_tokens=1 and were cut there" in err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_names_the_levers(run, tmp_path, monkeypatch, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(SoftPromptTrainer, "train", fail)
    message = error_of(run(*train_flags(tmp_path)))
    assert message.startswith("out of memory. Lower --per_device_train_batch_size (now 2) or ")
    assert "--workspace_mib (now 256)" in message
    assert "--gradient_accumulation_steps" in message


def test_a_programming_error_keeps_its_traceback(run, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(SoftPromptTrainer, "train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run(*train_flags(tmp_path))


@pytest.mark.slow
def test_a_programming_error_asks_for_a_report():
    program = (
        "import sys; from softprompt_fast.cli import main, parser; sys.argv[1:] = ['train'];"
        "parser.run_command = lambda *_: 1 / 0; main.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "ZeroDivisionError" in done.stderr
    assert done.stderr.splitlines()[-1].endswith("/issues")


def test_another_chat_template_is_refused(run, finished_run, tmp_path):
    inputs = json.loads((finished_run / "run.json").read_text())["inputs"]
    model = tmp_path / "model"
    shutil.copytree(inputs["model"], model)
    template = next(model.glob("chat_template.jinja"))
    command = ("generate", "--prompt_dir", finished_run, "--model", model, "hello")
    assert run(*command)[0] == 0
    template.write_text(template.read_text().replace("assistant", "helper"))
    assert error_of(run(*command)).startswith("The soft prompt was trained with another chat temp")


def test_a_tilde_is_the_home_directory(run, finished_run, monkeypatch):
    monkeypatch.setenv("HOME", str(finished_run.parent))
    code, out, _err = run("generate", f"--prompt_dir=~/{finished_run.name}", "hello")
    assert code == 0
    assert out.strip()


def test_a_missing_package_is_named(run, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise ImportError("quantization requires bitsandbytes")

    monkeypatch.setattr(SoftPromptTrainer, "train", fail)
    message = error_of(run(*train_flags(tmp_path)))
    assert message == "a package is missing or too old: quantization requires bitsandbytes"


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_closed_output_is_an_error(closed, tmp_path):
    done = subprocess.run(
        ["sh", "-c", f"exec {sys.executable} -m softprompt_fast --help {closed}"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert ("standard output is closed" in done.stderr) == (closed == ">&-")


@pytest.mark.slow
def test_a_closed_input_is_an_empty_one(finished_run):
    command = f"{sys.executable} -m softprompt_fast generate --prompt_dir {finished_run} <&-"
    done = subprocess.run(["sh", "-c", f"exec {command}"], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "error: the question is empty\n")


@pytest.mark.parametrize(
    ("left_over", "missing"),
    [({"LOCAL_RANK": "0"}, "RANK"), ({"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_RANK")],
    ids=str,
)
def test_what_a_launcher_left_over_is_named(run, tmp_path, monkeypatch, left_over, missing):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    message = usage_error_of(run(*train_flags(tmp_path)))
    assert (
        f"the environment has some of RANK, WORLD_SIZE and LOCAL_RANK, but no {missing}: "
        in message
    )


def test_a_prompt_that_does_not_fit_is_refused_before_the_teachers_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("softprompt_fast.teacher.teacher.Teacher.answer", lambda *_, **__: 1 / 0)
    message = error_of(run(*train_flags(tmp_path, num_virtual_tokens=500)))
    assert "train.jsonl:1: 500 virtual tokens, the query's" in message


def test_a_rank_without_other_processes_is_no_reason_to_be_silent(run, finished_run, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    command = ("generate", "--prompt_dir", finished_run, "hello")
    code, out, _err = run(*command)
    assert code == 0
    assert out.strip()
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = usage_error_of(run(*command))
    assert message.startswith("generate runs in one process, and WORLD_SIZE=2 says that this is")


def test_the_report_is_written_before_anything_is_shown(run, finished_run, monkeypatch):
    def closed_by_head(*things):
        assert (finished_run / "evaluation.html").exists()
        raise SystemExit(1)

    monkeypatch.setattr("softprompt_fast.cli.commands.eval.side_by_side", closed_by_head)
    with pytest.raises(SystemExit):
        run("eval", "--num_samples=1", "--prompt_dir", finished_run)
    report = json.loads((finished_run / "evaluation.json").read_text())
    assert report["answers"]


def test_a_loss_that_is_not_finite_names_the_examples(run, tmp_path):
    flags = train_flags(tmp_path, save_steps=100, max_grad_norm=0, learning_rate="3e38")
    message = error_of(run(*flags))
    assert message.startswith("The loss is nan at step ")
    assert f"{tmp_path / 'train.jsonl'}:" in message
    assert "lower learning_rate" in message


def test_eval_and_generate_need_a_prompt(run, tmp_path):
    for command in (["eval", "--eval_file=x"], ["generate", "hello"]):
        code, _, err = run(*command, "--prompt_dir", tmp_path)
        assert code == 1
        assert "error: " in err
    error = error_of(run("generate", "hello", "--prompt_dir", tmp_path))
    assert error.startswith(f"{tmp_path} holds no saved soft prompt: no adapter_model")
    assert "pass --eval_file" in error_of(run("eval", "--prompt_dir", tmp_path))


def test_messages_cannot_drive_the_terminal(run, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"\\u001b[2J\\u202epromt\\u0007": "a", "x": 1}\n')
    code, _, err = run("train", f"--train_file={data}", "--model=m", f"--output_dir={tmp_path}/o")
    assert code == 1
    assert "\x1b" not in err
    assert "\x07" not in err
    assert "\u202e" not in err
    assert printable("a\x1b[31m\x9b\u2066b\ttab\nline é 漢") == (
        "a\\x1b[31m\\x9b\\u2066b\ttab\nline é 漢"
    )


def test_a_hostile_data_file_leaves_page_and_terminal_unharmed(run, finished_run, tmp_path):
    hostile = "<script>alert(1)</script><b>\x1b[2J\x07\u202e[red]</title> {{ 7 * 7 }}"
    data = write_lines(tmp_path / "hostile.jsonl", [hostile, "\x00", "Hi"])
    evaluate = ("eval", "--prompt_dir", finished_run, "--eval_file", data)
    code, out, err = run(*evaluate)
    assert code == 0, err
    page = (finished_run / "evaluation.html").read_text()
    for text in (out, page):
        assert "{{ 7 * 7 }}" in text
        assert not re.search("[\x00\x1b\x07\u202e]", text)
    assert "<script" not in page
    write_lines(data, ["Hi", "<b>" * 30_000])
    message = error_of(run(*evaluate))
    assert message.startswith(f"{data}:2: context and query take 900")
    for line in (
        '{"a%s": 1}',
        '{"prompt": [{"role": "a%s"}]}',
        '{"a%s": 1, "a%s": 2}',
        "[%s",
        "%s",
    ):
        data.write_text(line.replace("%s", "\\u001b[2J" * 900_000))
        message = error_of(run(*evaluate))
        assert message.startswith(f"{data}:1:")
        assert len(message) < 1000
