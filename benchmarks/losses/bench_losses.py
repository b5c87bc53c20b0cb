"""Every implementation of every loss, over the heads of real models.

pytest benchmarks/losses/bench_losses.py                                     # the quick set
pytest benchmarks/losses/bench_losses.py --full                              # all heads, T to 16384
pytest benchmarks/losses/bench_losses.py --full -k "Gemma and T16- and TRL"  # some lines of it
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import FULL, MAX_PASS_FLOP, QUICK, Shape
from device import DEVICE
from losses.measure import line, measure, refusal
from losses.peers import PEERS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = FULL if metafunc.config.getoption("--full") else QUICK
    metafunc.parametrize(
        ("shape", "problem", "peer"),
        [
            pytest.param(shape, problem, peer, id=f"{shape.model}-T{shape.T}-{problem}-{peer}")
            for shape, problems in cases
            if shape.pass_flop <= MAX_PASS_FLOP[DEVICE.type]
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
