"""What the measuring programs of ``make gpu`` share: records, clocks, memory.

On a GPU time is CUDA events; in a rehearsal on the CPU it is perf_counter, and the Triton kernels
run in their interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from statistics import median
from typing import Any, NamedTuple

import torch
from device import DEVICE, ON_GPU, Work, spread, synchronize

# A timed block lasts at least this long: the launch of its first kernel is not what is measured.
BLOCK_MILLISECONDS = 5.0
POISONED_BYTES = 2**31


class Timing(NamedTuple):
    milliseconds: float
    spread: float
    """distance of the quartiles, relative to the median"""


def emit(table: str, **record: Any) -> None:
    """One record for the driver, which keeps it whatever happens to this process next."""
    print("@" + json.dumps({"table": table, **record}), flush=True)


def kernels_can_run() -> contextlib.AbstractContextManager:
    """Triton's interpreter needs repairs for bf16; a GPU needs nothing."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return contextlib.nullcontext()
    from interpreter import repaired

    return repaired()


def milliseconds(work: Work, repeats: int = 1) -> float:
    """Of one call, on the device."""
    synchronize()
    if not ON_GPU:
        start_seconds = time.perf_counter()
        for _ in range(repeats):
            work()
        return 1e3 * (time.perf_counter() - start_seconds) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def interleaved(works: dict[str, Work], seconds: float = 2.0) -> dict[str, Timing]:
    """Every round times every work once, so that all of them see the same machine."""
    repeats = {}
    for name, work in works.items():
        work()
        repeats[name] = max(1, min(50, int(BLOCK_MILLISECONDS / milliseconds(work))))
        if not ON_GPU:
            repeats[name] = 1
    times: dict[str, list[float]] = {name: [] for name in works}
    least, most = (7, 50) if ON_GPU else (2, 2)
    stop = time.monotonic() + seconds
    for done in range(most):
        if done >= least and time.monotonic() > stop:
            break
        for name, work in works.items():
            times[name].append(milliseconds(work, repeats[name]))
    return {name: Timing(median(values), spread(values)) for name, values in times.items()}


def host_microseconds(work: Work, calls: int = 15) -> float:
    """Until the call returns, with an idle device: what launching costs."""
    times = []
    for _ in range(calls if ON_GPU else 1):
        synchronize()
        start = time.perf_counter()
        work()
        times.append(1e6 * (time.perf_counter() - start))
    synchronize()
    return median(times)


def capture(work: Work) -> Work | None:
    """The replay of ``work`` as a CUDA graph; None without a GPU."""
    if not ON_GPU:
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def poison_free_memory() -> None:
    """The allocator hands out NaN next: an output that nothing wrote cannot look right."""
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.full((POISONED_BYTES // 4,), torch.nan, device=DEVICE)
