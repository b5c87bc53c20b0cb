"""Time of a training step's loss, in bare passes over the head timed in the same run.

A pass is one ``torch.mm`` of T x D with the head: the least that any loss has to do. NLL needs two
(logits, gradient), KL with a teacher on line three. Each round first times the bare products, then
the step, so that both see the same machine. What is timed has just been checked against fp64.

    pytest benchmarks                              # prints and writes benchmarks/results/cpu.json
"""

from __future__ import annotations

import time
from statistics import median

import pytest
import torch
from peak_memory import peak_mib
from problems import COMPARISONS, SHAPES, Comparison, Shape, Tensors, gradient

ROUNDS = 7
CHECKED_ROWS = 16
CASES = [
    pytest.param(shape, loss, implementation, id=f"{shape}-{loss}-{implementation}")
    for shape in SHAPES
    for loss, comparison in COMPARISONS.items()
    for implementation in comparison.implementations
]


class BarePasses:
    """Times of the products that the loss cannot avoid, round by round."""

    def __init__(self, tensors: Tensors, passes: int) -> None:
        self.hidden, self.weight = tensors.hidden.detach(), tensors.weight
        self.logits = torch.empty(len(self.hidden), len(self.weight))
        self.gradient = torch.empty_like(self.hidden)
        self.forward_passes = passes - 1
        self.seconds: list[float] = []

    def __call__(self) -> None:
        start = time.perf_counter()
        for _ in range(self.forward_passes):
            torch.mm(self.hidden, self.weight.T, out=self.logits)
        torch.mm(self.logits, self.weight, out=self.gradient)
        self.seconds.append(time.perf_counter() - start)


def gradient_error(comparison: Comparison, implementation: str, tensors: Tensors) -> float:
    """Relative L2 distance of the gradient from fp64, on the first rows."""
    exact = gradient(comparison.oracle, tensors.first(CHECKED_ROWS, torch.float64))
    first = tensors.first(CHECKED_ROWS, torch.float32)
    if comparison.sketched:
        first = first.sketched()
    ours = gradient(comparison.implementations[implementation], first)
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("shape", "loss", "implementation"), CASES)
def bench_loss(benchmark, record_row, shape: Shape, loss: str, implementation: str) -> None:
    comparison = COMPARISONS[loss]
    tensors = comparison.tensors(shape)
    error = gradient_error(comparison, implementation, tensors)
    assert error < 1e-4

    bare = BarePasses(tensors, comparison.passes)
    step = comparison.implementations[implementation]
    benchmark.pedantic(gradient, args=(step, tensors), setup=bare, rounds=ROUNDS, warmup_rounds=1)
    seconds, bare_seconds = benchmark.stats.stats.median, median(bare.seconds[1:])
    del tensors, bare
    record_row(
        shape=shape,
        loss=loss,
        implementation=implementation,
        milliseconds=1e3 * seconds,
        bare_milliseconds=1e3 * bare_seconds,
        passes=comparison.passes * seconds / bare_seconds,
        floor=comparison.passes,
        ratio=seconds / bare_seconds,
        peak_mib=peak_mib(shape, loss, implementation),
        gradient_error=error,
    )
