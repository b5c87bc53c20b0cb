"""The engine of the streaming backend: Triton kernels that compute logits wherever they need them.

Memory is a few numbers per token and a strip of the gradient by the logits, never a row of them;
``streaming_sweeps.py`` goes over the head. This engine reads the head more often than the one of
whole rows (``gpu_rows.py``), and takes over from it where the workspace is too small for that.

Legend: T tokens, R of them at a time, D hidden width, V vocabulary, K more targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .matmul import gradient_dtype
from .problem import NO_TARGET, Problem, check_workspace, round_up

# Strips of as many sums fill the chip whatever R is.
MOST_SUMS = 16
LEAST_ROWS = 8
# fp32 numbers that a row's statistics take in every part of the vocabulary: two streams and a peak.
NUMBERS_PER_PART = 7


class Plan(NamedTuple):
    """How the workspace is spent."""

    rows: int  # R
    strip: int  # columns of dz


def token_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """loss [T] fp32, dhidden [T, D] fp32 (empty without gradient)."""
    from . import streaming_sweeps as sweeps

    problem = problem.contiguous()
    tokens, width = problem.hidden.shape
    empty = problem.hidden.new_empty
    loss = empty(tokens, dtype=torch.float32)
    dhidden = empty((tokens if problem.with_grad else 0, width), dtype=torch.float32)
    plan = plan_workspace(problem)
    for start in range(0, tokens, plan.rows):
        rows = slice(start, start + plan.rows)
        chunk = sweeps.Chunk.of(problem.slice(start, start + plan.rows))
        statistics, z_more = sweeps.softmax(chunk)
        sweeps.loss_(chunk, statistics, loss[rows])
        if problem.with_grad:
            sweeps.gradient_(chunk, statistics, z_more, dhidden[rows], plan.strip)
    return loss, dhidden


def plan_workspace(problem: Problem) -> Plan:
    """All rows with the widest strip that fits, else the narrowest strip and fewer rows."""
    from ..kernels.arguments import entry_numbers
    from ..kernels.streaming import PARTS, STATISTICS, SUM

    K, _ = entry_numbers(problem.target or NO_TARGET)
    numbers = NUMBERS_PER_PART * PARTS.value + STATISTICS + 1 + K
    column_bytes = gradient_dtype(problem.head.weight).itemsize if problem.with_grad else 0
    budget = problem.workspace_mib * 2**20
    row_bytes = 4 * numbers + SUM * column_bytes
    check_workspace(LEAST_ROWS * row_bytes, problem.workspace_mib, f"a chunk of {LEAST_ROWS} rows")
    rows = max(1, min(int(budget / row_bytes), len(problem.hidden)))
    if not problem.with_grad:
        return Plan(rows, 0)
    widest = min(MOST_SUMS * SUM, round_up(len(problem.head.weight), SUM))
    strip = int((budget / rows - 4 * numbers) / column_bytes) // SUM * SUM
    return Plan(rows, min(strip, widest))
