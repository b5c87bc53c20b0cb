"""A whole training step at the shapes of real models: its time, its memory, and the most answer
tokens that fit into a budget of memory beyond the model. The weights are random.

Each line is a fresh process with the trainer's own loss, through the whole frozen model and back to
the soft prompt, with activation checkpointing. Memory is measured at two sizes; the line through
the last two says which size should fill the budget, until the largest that fits has been run.
"""

from __future__ import annotations

from typing import Any

import pytest
from fresh_process import in_fresh_process
from training.step import CONFIGS, KINDS, measure_steps

QUICK, FULL = ["SmolLM2-135M"], list(CONFIGS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    models = FULL if metafunc.config.getoption("--full") else QUICK
    cases = [(model, kind) for model in models for kind in KINDS]
    metafunc.parametrize(("model", "kind"), cases, ids=[f"{m}-{k}" for m, k in cases])


def bench_training_step(record: Any, model: str, kind: str) -> None:
    with in_fresh_process(measure_steps, model, kind) as wait:
        figures = wait()
    record("training_steps", model=model, implementation=kind, **figures)
