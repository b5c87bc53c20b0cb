"""How time and memory grow with the tokens T and with the vocabulary V.

render/tables.py fits the slopes: the exponent of T or V in the time, and the MiB that a thousand
tokens or a thousand entries add.
"""

from __future__ import annotations

from typing import Any

import pytest
from device import ON_GPU
from losses.measure import line, measure
from losses.problems import MAIN, Shape

SCALE = 16 if ON_GPU else 1
POINTS = {
    "T": [Shape.of("SmolLM2-135M", SCALE * T) for T in (64, 256, 1024)],
    "V": [Shape(model="any", T=SCALE * 128, D=576, V=V) for V in (32768, 131072, 262144)],
}
LOSSES = {"softprompt_fast": MAIN, "PyTorch": ["NLL", "KL"]}


@pytest.mark.parametrize(
    ("axis", "shape", "problem", "peer"),
    [
        pytest.param(
            axis, shape, problem, peer, id=f"{axis}{getattr(shape, axis)}-{problem}-{peer}"
        )
        for peer, problems in LOSSES.items()
        for problem in problems
        for axis, shapes in POINTS.items()
        for shape in shapes
    ],
)
def bench_growth(
    benchmark: Any, record: Any, axis: str, shape: Shape, problem: str, peer: str
) -> None:
    figures = measure(benchmark, shape, problem, peer)
    record("growth", axis=axis, **line(shape, problem, peer), **figures)
