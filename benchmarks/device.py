"""The device that is measured, its clock and its memory: a GPU where there is one, else the CPU."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

Work = Callable[[], Any]


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def seconds(work: Work) -> float:
    """Of one call, until the device has done it."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def spread(values: list[float]) -> float:
    """Distance of the quartiles, relative to the median."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / median(values)


def peak_mib(work: Work) -> float:
    """MiB in use at the peak of one call, beyond those in use before it.

    Of a GPU what PyTorch allocates. Of a CPU what is resident: Linux only, and only in a process
    that does nothing else. What the call returns, or leaves behind, is part of it.
    """
    if ON_GPU:
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        synchronize()
        del result
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls have left would be taken for nothing
    Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
    before = _resident_mib("VmRSS")
    result = work()
    peak = _resident_mib("VmHWM")
    del result
    return peak - before


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
