"""How time and memory grow with the tokens T and with the vocabulary V.

render/tables.py fits the slopes: the exponent of T or V in the time, and the MiB that a thousand
tokens or a thousand entries add.
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import DEVICE_DTYPE, GROWTH_LOSSES, GROWTH_SCALE, Shape, growth_shapes
from device import DEVICE
from losses.measure import line, measure

POINTS = growth_shapes(GROWTH_SCALE[DEVICE.type])
DTYPE = DEVICE_DTYPE[DEVICE.type]


@pytest.mark.parametrize(
    ("axis", "shape", "problem", "peer"),
    [
        pytest.param(
            axis, shape, problem, peer, id=f"{axis}{getattr(shape, axis)}-{problem}-{peer}"
        )
        for axis, shapes in POINTS.items()
        for shape in shapes  # its tensors are made once
        for peer, problems in GROWTH_LOSSES.items()
        for problem in problems
    ],
)
def bench_growth(
    benchmark: Any, record: Any, axis: str, shape: Shape, problem: str, peer: str
) -> None:
    figures = measure(benchmark, shape, problem, peer, DTYPE)
    record("growth", axis=axis, **line(shape, problem, peer, DTYPE), **figures)
