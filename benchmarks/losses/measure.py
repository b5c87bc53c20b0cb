"""One line of the tables: the time, memory and error of one implementation of one loss.

Each round times the bare products that no loss can avoid, then a step, so that both see the same
machine. Nothing is timed before its gradient has been compared with fp64.
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

import torch
from cases import DTYPES, MAX_PRODUCT_SECONDS, Shape
from device import ON_GPU, spread, synchronize
from fresh_process import in_fresh_process, step_cost
from losses.peers import OURS, PEERS
from losses.problems import (
    PROBLEMS,
    BarePasses,
    Loss,
    Tensors,
    emulated_product_seconds,
    exact,
    gradient,
    tensors_of,
)

MAX_ROUNDS, MIN_ROUNDS, SECONDS = 5, 3, 1.0
# A step that takes longer is timed once: what disturbs it is short beside it.
LONG_STEP_SECONDS = 1.0


class Step:
    """Forward and backward; how long the forward part took is kept aside."""

    def __init__(self, loss: Loss, tensors: Tensors) -> None:
        self.loss, self.tensors = loss, tensors
        self.forward_seconds: list[float] = []

    def __call__(self) -> None:
        start = time.perf_counter()
        loss = self.loss(self.tensors)
        synchronize()
        self.forward_seconds.append(time.perf_counter() - start)
        torch.autograd.grad(loss, self.tensors.hidden)
        synchronize()


def line(shape: Shape, problem: str, peer: str, dtype: str) -> dict[str, Any]:
    """What the figures are about."""
    return {
        "dtype": dtype,
        "model": shape.model,
        "T": shape.T,
        "D": shape.D,
        "V": shape.V,
        "loss": problem,
        "implementation": peer,
    }


def refusal(shape: Shape, peer: str, dtype: str) -> str | None:
    """Why the peer cannot be measured here."""
    if (reason := PEERS[peer].reason()) is not None:
        return reason
    if ON_GPU or PEERS[peer] is OURS:
        return None
    # logits of both models, their softmax and its gradient, fp32
    needed = 6 * 4 * shape.T * shape.V
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        return f"would need {needed / 2**30:.0f} GiB of memory: {there / 2**30:.0f} are there"
    if PEERS[peer].torch_product_back:
        duration = emulated_product_seconds(shape, getattr(torch, dtype))
        if duration > MAX_PRODUCT_SECONDS:
            return (
                f"{shape.model}, T={shape.T} in {DTYPES[dtype]}: the product of the gradient with "
                f"the head alone takes about {duration:.0f} s in PyTorch, which has plain loops "
                "for it on this CPU"
            )
    return None


def measure(benchmark: Any, shape: Shape, problem: str, peer: str, dtype: str) -> dict[str, Any]:
    """The figures of one line.

    Raises AssertionError, before anything is timed, if its gradient is wrong.
    """
    torch.compiler.reset()  # every shape is compiled for itself
    torch_dtype = getattr(torch, dtype)
    with in_fresh_process(step_cost, peer, problem, shape, torch_dtype) as wait:
        tensors = tensors_of(shape, torch_dtype)
        loss = PEERS[peer].losses[problem](tensors)
        truth = exact(problem, shape, torch_dtype)
        bounds = truth.bounds
        bound = bounds.contract if PEERS[peer] is OURS else bounds.rounded_logits
        error = truth.check(gradient(loss, tensors), bound)
        cost = wait()

    bare, step, passes = BarePasses(tensors), Step(loss, tensors), PROBLEMS[problem].passes
    bare()
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS / cost.seconds)))
    if cost.seconds > LONG_STEP_SECONDS:
        rounds = 1
    benchmark.pedantic(step, setup=bare, rounds=rounds)
    times, floor = benchmark.stats.stats.data, bare.floor_seconds(passes)[1:]
    return {
        "milliseconds": 1e3 * median(times),
        "spread": spread(times),
        "forward_milliseconds": 1e3 * median(step.forward_seconds),
        "bare_milliseconds": 1e3 * median(floor),
        "bare_spread": spread(floor),
        "bare_converted": bare.converted,
        "floor": passes,
        "passes": passes * median(times) / median(floor),
        "ratio": median(times) / median(floor),
        "rounds": rounds,
        "peak_mib": cost.peak_mib,
        "gradient_error": error,
    }
