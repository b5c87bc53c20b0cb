"""The engine in plain PyTorch: logits of a chunk, row kernels, gradient of the chunk.

The logits of a chunk are written once, overwritten with their gradient a few rows at a time, and
multiplied back. What the row kernels allocate on the way stays small, and in the cache.

Legend: T tokens, C rows in a chunk, R rows in a call of the row kernels, D hidden width,
V vocabulary. Logits are fp32 whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .formulas import divergence_rows, sparse_target_rows
from .problem import Problem, check_workspace

# A matrix product may take another summation order for a handful of rows; a multiple of this many
# rows keeps a token's loss the same in whatever batch it sits (measured on MKL: 1, 2, 3 and 5
# differ).
ROW_MULTIPLE = 8
# The row kernels take as few as this many rows at a time.
LEAST_GROUP = 4
# [R, V] fp32 buffers alive at once in the row kernels: targets alone, and with a teacher.
BUFFERS_NLL = 5
BUFFERS_DIVERGENCE = 22
# Entries of the vocabulary in one product: a longer sum would lose digits.
HEAD_BLOCK = 16384
# Parts of the workspace: a block of a half-precision head in fp32, and the row kernels' buffers.
HEAD_SHARE = 1 / 8
ROWS_SHARE = 1 / 8


class Plan(NamedTuple):
    """How the workspace is spent."""

    chunk: int  # C
    group: int  # R
    head_floats: int  # of a block of the head, where it is widened to fp32


def token_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """loss [T] fp32, dhidden [T, D] fp32 (empty without gradient)."""
    tokens = len(problem.hidden)
    problem = problem.padded_to_multiple(ROW_MULTIPLE)
    padded, width = problem.hidden.shape
    plan = plan_workspace(problem)
    empty = problem.hidden.new_empty
    loss = empty(padded, dtype=torch.float32)
    dhidden = empty((padded if problem.with_grad else 0, width), dtype=torch.float32)
    logits = empty(
        (len(problem.streams), plan.chunk, len(problem.head.weight)), dtype=torch.float32
    )
    widened = empty(plan.head_floats, dtype=torch.float32)
    for start in range(0, padded, plan.chunk):
        rows = slice(start, min(start + plan.chunk, padded))
        chunk = logits[:, : rows.stop - rows.start]
        for z, (hidden, own) in zip(chunk, problem.streams, strict=True):
            _project(hidden[rows], own.weight, widened, z)
        for first in range(0, chunk.shape[1], plan.group):
            group = chunk[:, first : first + plan.group]
            _row_kernels(problem, slice(start + first, start + first + group.shape[1]), group, loss)
        if problem.with_grad:
            _project_back(chunk[0], problem.head.weight, widened, dhidden[rows])
    return loss[:tokens], dhidden[:tokens]


def plan_workspace(problem: Problem) -> Plan:
    """ROWS_SHARE for the row kernels, or what ROW_MULTIPLE rows need; the rest for the logits."""
    vocabulary = len(problem.head.weight)
    streams = len(problem.streams)
    buffers = BUFFERS_NLL if problem.teacher is None else BUFFERS_DIVERGENCE
    widest = max(head.weight.shape[1] for _, head in problem.streams)
    logits_floats = streams * vocabulary + widest  # a row's, its hidden state in fp32 included
    rows_floats = buffers * vocabulary
    head_share = 0.0 if problem.head.weight.dtype == torch.float32 else HEAD_SHARE

    needed = (ROW_MULTIPLE * logits_floats + LEAST_GROUP * rows_floats) / (1 - head_share)
    check_workspace(4 * needed, problem.workspace_mib, f"a chunk of {ROW_MULTIPLE} rows")
    budget = problem.workspace_mib * 2**20 / 4
    head_floats = min(HEAD_BLOCK, max(1, int(budget * head_share / widest))) * widest
    budget *= 1 - head_share
    group = max(LEAST_GROUP, _fit(budget * ROWS_SHARE, rows_floats, LEAST_GROUP))
    chunk = _fit(budget - group * rows_floats, logits_floats, ROW_MULTIPLE)
    return Plan(min(chunk, max(ROW_MULTIPLE, len(problem.hidden))), group, head_floats)


def _fit(floats: float, row_floats: int, multiple: int) -> int:
    """As many rows as take no more than ``floats``, in multiples."""
    return int(floats / row_floats) // multiple * multiple


def _row_kernels(problem: Problem, rows: slice, logits: Tensor, loss: Tensor) -> None:
    """Finish the raw products [streams, R, V], fill loss[rows]; logits[0] becomes its gradient."""
    transform = problem.head.transform
    z, *teacher = (
        transform(raw if head.bias is None else raw + head.bias)
        for raw, (_, head) in zip(logits, problem.streams, strict=True)
    )
    part = problem.slice(rows.start, rows.stop)
    if part.teacher is None:
        assert part.target is not None
        loss[rows], dz = sparse_target_rows(z, part.target)
    else:
        loss[rows], dz = divergence_rows(z, teacher[0], part.teacher.beta)
        if part.target is not None:
            nll, dz_nll = sparse_target_rows(z, part.target)
            loss[rows] = problem.alpha * loss[rows] + (1 - problem.alpha) * nll
            dz.mul_(problem.alpha).add_(dz_nll, alpha=1 - problem.alpha)
    if problem.with_grad:
        torch.mul(dz, transform.slope(z), out=logits[0])


def _project(hidden: Tensor, weight: Tensor, head: Tensor, z: Tensor) -> None:
    """z [C, V] = hidden [C, D] @ weight.T"""
    hidden = hidden.float()
    for columns, block in _fp32_blocks(weight, head):
        torch.mm(hidden, block.T, out=z[:, columns])


def _project_back(dz: Tensor, weight: Tensor, head: Tensor, dhidden: Tensor) -> None:
    """dhidden [C, D] = dz [C, V] @ weight"""
    dhidden.zero_()
    for columns, block in _fp32_blocks(weight, head):
        # not addmm_: for narrow heads MKL would go on adding to the sum one entry at a time
        dhidden += dz[:, columns] @ block


def _fp32_blocks(weight: Tensor, head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Block after block of the head; where it is not fp32, widened into ``head``."""
    vocabulary, width = weight.shape
    step = HEAD_BLOCK
    if weight.dtype != torch.float32:
        step = min(step, len(head) // width)
    for start in range(0, vocabulary, step):
        block = weight[start : start + step]
        if weight.dtype != torch.float32:
            block = head[: block.numel()].view_as(block).copy_(block)
        yield slice(start, start + len(block)), block
