"""Every implementation of every loss, over the heads of real models.

pytest benchmarks/losses/bench_losses.py                                     # the quick set
pytest benchmarks/losses/bench_losses.py --full                              # all heads, T to 16384
pytest benchmarks/losses/bench_losses.py --full -k "Gemma and T16- and TRL"  # some lines of it
"""

from __future__ import annotations

from typing import Any

import pytest
from device import ON_GPU
from losses.measure import line, measure, refusal
from losses.peers import PEERS
from losses.problems import HEADS, MAIN, PROBLEMS, Shape

QUICK = [
    (Shape.of("SmolLM2-135M", 64), list(PROBLEMS)),
    (Shape.of("SmolLM2-135M", 128), MAIN),
    (Shape.of("Gemma-3-1B", 32), MAIN),
]
# A pass of 16384 tokens over the largest head takes 0.05 s on an H200, and minutes on two cores.
MAX_PASS_FLOP = 1e14 if ON_GPU else 1e12
FULL = [
    (shape, list(PROBLEMS) if T in (256, 4096) else MAIN)
    for T in (16, 64, 256, 1024, 4096, 16384)
    for shape in (Shape.of(model, T) for model in HEADS)
    if shape.pass_flop <= MAX_PASS_FLOP
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = FULL if metafunc.config.getoption("--full") else QUICK
    metafunc.parametrize(
        ("shape", "problem", "peer"),
        [
            pytest.param(shape, problem, peer, id=f"{shape.model}-T{shape.T}-{problem}-{peer}")
            for shape, problems in cases
            for problem in problems
            for peer in PEERS
            if problem in PEERS[peer].losses
        ],
    )


def bench_loss(benchmark: Any, record: Any, shape: Shape, problem: str, peer: str) -> None:
    if (reason := refusal(shape, peer)) is not None:
        record("losses", **line(shape, problem, peer), reason=reason)
        pytest.skip(reason)
    record("losses", **line(shape, problem, peer), **measure(benchmark, shape, problem, peer))
