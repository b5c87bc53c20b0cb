"""Several processes train as one does with the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import make_examples, make_trainer
from toy import make_model
from toy_run import train_flags

from softprompt_fast.cli import main

SECONDS = 120


def run_processes(count: int, *command: str) -> subprocess.CompletedProcess[str]:
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, *command],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def flags(folder, processes: int, **changes):
    return train_flags(
        folder,
        f"run{processes}",
        **dict(
            # 5 examples: the second batch of an epoch holds one, and a process has none.
            per_device_train_batch_size=4 // processes,
            use_cpu=True,
            # Plain SGD shows a gradient of the wrong size; Adam would hide it.
            optim="sgd",
            learning_rate=0.5,
            logging_steps=1,
            # 3 examples: the processes have different numbers of them.
            eval_strategy="steps",
            eval_steps=3,
        )
        | changes,
    )


def history(run) -> list[dict[str, float]]:
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    names = ("step", "loss", "eval_loss", "grad_norm", "learning_rate", "epoch")
    return [{n: entry[n] for n in names if n in entry} for entry in state["log_history"]]


def test_two_processes_train_as_one(tmp_path):
    assert main(flags(tmp_path, 1)) == 0
    done = run_processes(2, "-m", "softprompt_fast", *flags(tmp_path, 2))
    assert done.returncode == 0, done.stderr
    for line in ("step 1:", "The soft prompt (4 virtual tokens) is in"):
        assert done.stdout.count(line) == 1  # one of them speaks
    alone, together = (tmp_path / f"run{count}" for count in (1, 2))
    assert len(history(alone)) == 6 + 2
    for one, two in zip(history(alone), history(together), strict=True):
        assert two == pytest.approx(one, rel=1e-5)
    prompts = [load_file(run / "adapter_model.safetensors") for run in (alone, together)]
    torch.testing.assert_close(*prompts, rtol=1e-5, atol=1e-6)


def test_an_error_in_one_process_ends_all_of_them(tmp_path):
    done = run_processes(2, __file__, str(tmp_path))
    assert done.returncode != 0
    assert "FloatingPointError: The loss is nan at step 0" in done.stderr


def train_on_a_state_that_is_not_finite(output_dir: str) -> None:
    """In one of two processes: the other one waits for its gradient."""
    model = make_model()
    examples = make_examples(model)
    examples[1].answer.hidden[0, 0] = torch.nan
    options = dict(train_sampling_strategy="sequential", per_device_train_batch_size=2)
    make_trainer(output_dir, model=model, examples=examples, **options).train()


if __name__ == "__main__":
    train_on_a_state_that_is_not_finite(sys.argv[1])
