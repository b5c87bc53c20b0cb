"""Resident memory of one step of forward and backward, in a fresh process."""

from __future__ import annotations

import ctypes
import multiprocessing
from pathlib import Path

from problems import COMPARISONS, Shape, gradient


def peak_mib(shape: Shape, loss: str, implementation: str) -> float:
    """MiB that the step holds at its peak beyond its inputs and the gradient it returns."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (shape, loss, implementation))


def _measure(shape: Shape, loss: str, implementation: str) -> float:
    comparison = COMPARISONS[loss]
    function = comparison.implementations[implementation]
    # code, thread pools and the allocator's first pages are not the step's
    gradient(function, comparison.tensors(Shape(model="warm-up", T=8, D=32, V=64)))
    tensors = comparison.tensors(shape)
    ctypes.CDLL(None).malloc_trim(0)  # what making them has left would be taken for nothing
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the high-water mark
    before = _status_mib("VmRSS")
    gradient(function, tensors)
    return _status_mib("VmHWM") - before - 4 * shape.T * shape.D / 2**20


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
