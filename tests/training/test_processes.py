"""Several processes train as one does with the same global batch."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_run import HELD_OUT, QUESTIONS, spawn, start, train_flags, wait_for

from softprompt_fast.cli.main import main

pytestmark = [pytest.mark.processes, pytest.mark.xdist_group("processes")]

SECONDS = 240
JOBS = str(Path(__file__).parents[1] / "support" / "process_jobs.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2")
WEIGHTS = "adapter_model.safetensors"

RUNS = {
    "sketch": {},
    "answers": dict(objective="nll", gradient_accumulation_steps=2),
    "hidden": dict(objective="mix", beta=0.5, teacher_cache=True),
    "online": dict(objective="mix", teacher_store="online"),
    "sharded": dict(shard_base=True, teacher_cache=True, gradient_accumulation_steps=2),
    "sharded_online": dict(shard_base=True, teacher_store="online", activation_checkpointing=True),
}
LONG = dict(use_cpu=True, max_steps=60, save_steps=10)


def run_processes(*command: str) -> subprocess.CompletedProcess[str]:
    process = spawn(*command)
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.terminate()  # and not kill: a launcher that is killed leaves its processes
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def flags(folder, name: str, processes: int) -> list[str]:
    changes = dict(RUNS[name])
    if changes.pop("teacher_cache", False):
        changes["teacher_cache"] = folder / f"cache-{name}{processes}"
    parts = processes * changes.get("gradient_accumulation_steps", 1)
    return train_flags(
        folder,
        f"{name}{processes}",
        **dict(
            # 5 examples: the second batch of an epoch holds one, and a process has none.
            per_device_train_batch_size=4 // parts,
            use_cpu=True,
            # Plain SGD shows a gradient of the wrong size; Adam would hide it.
            optim="sgd",
            learning_rate=0.5,
            logging_steps=1,
            # 3 examples: the processes have different numbers of them.
            eval_strategy="steps",
            eval_steps=3,
            per_device_eval_batch_size=1,
            # Two shards, and one.
            teacher_batch_size=1,
        )
        | changes,
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with the run "stopped", which was sent SIGTERM."""
    folder = tmp_path_factory.mktemp("processes")
    process = start(train_flags(folder, "stopped", **LONG), *TORCHRUN)
    wait_for(folder / "stopped/checkpoint-10/manifest.json", process)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=SECONDS)
    assert output.count("Stopped after step") == 1, errors
    return folder


@pytest.fixture(
    scope="module", params=[pytest.param(tuple(RUNS), marks=pytest.mark.slow, id="all of them")]
)
def done(stopped, request):
    """(folder, what the two processes wrote). All runs, by one process and by two."""
    commands = {name: flags(stopped, name, 2) for name in request.param}
    commands |= {name: train_flags(stopped, name, **LONG) for name in ("stopped", "undisturbed")}
    (stopped / "commands.json").write_text(json.dumps(commands))
    for name in request.param:
        assert main(flags(stopped, name, 1)) == 0
    jobs = ("train_all", str(stopped / "commands.json"), "answer_alike", str(stopped / "alike"))
    together = run_processes(*ACCELERATE, JOBS, *jobs)
    assert together.returncode == 0, together.stderr
    return stopped, together


def history(run) -> list[dict[str, float]]:
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    names = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "epoch")
    return [{n: entry[n] for n in names if n in entry} for entry in state["log_history"]]


def assert_trained_alike(folder, name: str) -> None:
    alone, together = (folder / f"{name}{count}" for count in (1, 2))
    assert len(history(alone)) == 6 + 2
    for one, two in zip(history(alone), history(together), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    prompts = [load_file(run / WEIGHTS) for run in (alone, together)]
    torch.testing.assert_close(*prompts, rtol=1e-5, atol=1e-6)
    logs = [json.loads((run / "training_log.json").read_text()) for run in (alone, together)]
    for one, two in zip(*(log.pop("steps") + log.pop("evaluations") for log in logs), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(done, name):
    assert_trained_alike(done[0], name)


def test_one_of_them_speaks(done):
    for line in ("step 1:", "The soft prompt (4 virtual tokens) is in"):
        assert done[1].stdout.count(line) == len(RUNS) + ("soft" in line) * 2


def test_each_answer_is_written_once(done):
    by_process = [json.loads((done[0] / f"wrote-{p}.json").read_text()) for p in (0, 1)]
    for name in RUNS:
        counts = [wrote[name] for wrote in by_process]
        assert sum(counts) == len(QUESTIONS + HELD_OUT)
        assert min(counts) > 0


@pytest.mark.parametrize("name", [name for name in RUNS if "teacher_cache" in RUNS[name]])
def test_they_leave_the_teacher_cache_that_one_would(done, name):
    alone, together = (
        {path.name: path.read_bytes() for path in (done[0] / f"cache-{name}{count}").iterdir()}
        for count in (1, 2)
    )
    assert len(alone) == 3 + 1
    assert alone == together


def test_a_sharded_teacher_answers_as_a_whole_one(done):
    assert (done[0] / "alike").read_text() == "True"


def test_a_stopped_run_ends_with_the_same_prompt(done):
    folder, together = done
    assert together.stderr.count("Going on from ") == 1
    # Nearly always to the bit; what rounds another way once in a while is not known.
    prompts = [load_file(folder / name / WEIGHTS) for name in ("stopped", "undisturbed")]
    torch.testing.assert_close(*prompts, rtol=1e-4, atol=1e-5)


def test_a_run_does_not_go_on_with_another_number_of_processes(done, capsys):
    assert main(flags(done[0], "sketch", 2)) == 1
    assert "num_processes: 2 there, 'default' now" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_of_them(tmp_path):
    failed = run_processes(*TORCHRUN, JOBS, "fail_in_one", str(tmp_path))
    assert failed.returncode != 0
    assert "FloatingPointError: The loss is nan at step 0" in failed.stderr
