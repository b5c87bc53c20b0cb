"""Memory and time of one step, in a process that has done nothing else.

Its allocator gives freed memory back at once (MALLOC_MMAP_THRESHOLD_): glibc would keep pieces of
it, in one trial three times as much as was in use.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from cases import Shape
from device import ON_GPU, peak_mib, seconds
from losses.peers import PEERS
from losses.problems import Tensors, gradient

Result = TypeVar("Result")


@contextlib.contextmanager
def in_fresh_process(
    function: Callable[..., Result], *arguments: object
) -> Iterator[Callable[[], Result]]:
    """``function(*arguments)`` runs there meanwhile; what is yielded waits for the result.

    On a CPU the process starts with PyTorch imported; and with that only, for the server imports
    from the working directory first, where this package may lie without its compiled extension.
    """
    folder = str(Path(__file__).parent)
    if folder not in os.environ.get("PYTHONPATH", ""):
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
    context = multiprocessing.get_context("spawn" if ON_GPU else "forkserver")
    if not ON_GPU:
        context.set_forkserver_preload(["torch._inductor.compile_fx"])
    with ProcessPoolExecutor(1, context) as pool:
        yield pool.submit(function, *arguments).result


class StepCost(NamedTuple):
    peak_mib: float
    """beyond its inputs and the gradient that it returns"""

    seconds: float
    """while something else runs too: an estimate"""


def step_cost(peer: str, problem: str, shape: Shape, dtype: torch.dtype) -> StepCost:
    """Of the second step: what the first leaves behind (code, thread pools) is not the step's."""
    tensors = Tensors.random(shape, dtype, different=1024)
    loss = PEERS[peer].losses[problem](tensors)
    times: list[float] = []

    def step() -> torch.Tensor:
        found: list[torch.Tensor] = []
        times.append(seconds(lambda: found.append(gradient(loss, tensors))))
        return found[0]

    step()
    peak = peak_mib(step) - tensors.hidden.nbytes / 2**20
    return StepCost(peak, times[-1])
