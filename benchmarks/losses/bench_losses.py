"""Every implementation of every loss, over the heads of real models, in bf16 and in fp32.

pytest benchmarks/losses/bench_losses.py                                     # the quick set
pytest benchmarks/losses/bench_losses.py --full                              # all heads, T to 16384
pytest benchmarks/losses/bench_losses.py --full -k "bf16 and Gemma and T16- and TRL"  # some lines
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import DTYPES, FULL, MAX_PASS_FLOP, QUICK, Shape
from device import DEVICE
from losses.measure import line, measure, refusal
from losses.peers import PEERS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = FULL if metafunc.config.getoption("--full") else QUICK
    metafunc.parametrize(
        ("dtype", "shape", "problem", "peer"),
        [
            pytest.param(
                dtype, shape, problem, peer, id=f"{name}-{shape.model}-T{shape.T}-{problem}-{peer}"
            )
            for dtype, name in DTYPES.items()
            for shape, problems in cases
            if shape.pass_flop <= MAX_PASS_FLOP[DEVICE.type]
            for problem in problems
            for peer in PEERS
            if problem in PEERS[peer].losses
        ],
    )


def bench_loss(
    benchmark: Any, record: Any, dtype: str, shape: Shape, problem: str, peer: str
) -> None:
    what = line(shape, problem, peer, dtype)
    if (reason := refusal(shape, peer, dtype)) is not None:
        record("losses", **what, reason=reason)
        pytest.skip(reason)
    record("losses", **what, **measure(benchmark, shape, problem, peer, dtype))
