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

from .formulas import divergence
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
    logits = empty((len(problem.heads), plan.chunk, len(problem.weight)), dtype=torch.float32)
    head = empty(plan.head_floats, dtype=torch.float32)
    for start in range(0, padded, plan.chunk):
        rows = slice(start, min(start + plan.chunk, padded))
        chunk = logits[:, : rows.stop - rows.start]
        for z, (hidden, weight, _) in zip(chunk, problem.heads, strict=True):
            _project(hidden[rows], weight, head, z)
        for first in range(0, chunk.shape[1], plan.group):
            group = chunk[:, first : first + plan.group]
            _row_kernels(problem, slice(start + first, start + first + group.shape[1]), group, loss)
        if problem.with_grad:
            _project_back(chunk[0], problem.weight, head, dhidden[rows])
    return loss[:tokens], dhidden[:tokens]


def plan_workspace(problem: Problem) -> Plan:
    """ROWS_SHARE for the row kernels, or what ROW_MULTIPLE rows need; the rest for the logits."""
    vocabulary = len(problem.weight)
    streams = len(problem.heads)
    buffers = BUFFERS_NLL if problem.teacher is None else BUFFERS_DIVERGENCE
    widest = max(weight.shape[1] for _, weight, _ in problem.heads)
    logits_floats = streams * vocabulary + widest  # a row's, its hidden state in fp32 included
    rows_floats = buffers * vocabulary
    head_share = 0.0 if problem.weight.dtype == torch.float32 else HEAD_SHARE

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
    z, *teacher = (
        problem.transform(raw if bias is None else raw + bias)
        for raw, (_, _, bias) in zip(logits, problem.heads, strict=True)
    )
    part = problem.slice(rows.start, rows.stop)
    if part.targets is None:
        loss[rows], dz = divergence_rows(z, teacher[0], problem.beta)
    elif not teacher:
        loss[rows], dz = sparse_target_rows(
            z, part.targets, problem.label_smoothing, part.more_targets, part.masses
        )
    else:
        nll, dz_nll = sparse_target_rows(z, part.targets, problem.label_smoothing)
        kl, dz = divergence_rows(z, teacher[0], problem.beta)
        loss[rows] = problem.alpha * kl + (1 - problem.alpha) * nll
        dz.mul_(problem.alpha).add_(dz_nll, alpha=1 - problem.alpha)
    if problem.with_grad:
        torch.mul(dz, problem.transform.slope(z), out=logits[0])


# The row kernels: logits of a chunk in, loss and gradient by the logits out. Row kernels in other
# languages have these names and shapes. A row never looks at another row.


def sparse_target_rows(
    z: Tensor,
    targets: Tensor,
    label_smoothing: float,
    more_targets: Tensor | None = None,
    masses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy against a target distribution t that is spread evenly but for a few entries.

    z [C, V], targets [C], more_targets [C, K], masses [C, 1 + K] as in ``Problem`` ->
    loss [C] = lse - sum of t_v z_v over all but the tail, dz [C, V] = q - t without the tail.

    With o = logsumexp over all entries but the target, -log q_target = softplus(o - z_target) and
    1 - q_target = sigmoid(o - z_target): a confident row keeps its relative accuracy, where
    lse - z_target and q_target - 1 would cancel.
    """
    smoothing, uniform = label_smoothing, label_smoothing / z.shape[-1]
    target = targets.unsqueeze(-1)
    # one number a row, in double: fp32 functions may round another way where rows are few
    z_target = z.gather(-1, target).double()
    other_z = z.scatter(-1, target, -torch.inf)
    top = other_z.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    others = other_z.sub_(top).exp_().sum(-1, keepdim=True, dtype=torch.float64).log() + top
    lse = torch.logaddexp(others, z_target)
    odds = others - z_target + (lse - lse)  # NaN where the row has no finite normaliser
    loss = (1 - smoothing) * torch.logaddexp(odds, torch.zeros_like(odds))
    if smoothing:
        loss += smoothing * (lse - z.mean(-1, keepdim=True))
    rest = torch.full_like(odds, smoothing)  # what t has outside the target
    dz = (z - lse.float()).exp_()
    if more_targets is not None and masses is not None:
        tail, more = masses[:, :1].double(), masses[:, 1:]
        entries = torch.where(more > 0, more_targets, target)
        rest += tail + more.sum(-1, keepdim=True, dtype=torch.float64)
        # all measured from z_target: what p is sure of is exact
        terms = torch.where(more > 0, more * (z.gather(-1, entries) - z_target), 0.0)
        loss += tail * z_target - terms.sum(-1, keepdim=True)
        loss = torch.where(z_target == -torch.inf, odds, loss)
        dz.scatter_add_(-1, entries, -more)
    dz.scatter_(-1, target, (rest - odds.sigmoid()).float())
    return loss.squeeze(-1).float(), dz.sub_(uniform) if uniform else dz


def divergence_rows(z: Tensor, z_teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence between teacher and student.    z, z_teacher [C, V] -> loss [C], dz [C, V]"""
    log_q = z.log_softmax(dim=-1)
    log_p = z_teacher.log_softmax(dim=-1)
    value, slope = divergence(beta)(log_p, log_q)
    dz = torch.addcmul(slope, log_q.exp(), slope.sum(-1, keepdim=True), value=-1)
    return value.sum(-1), dz


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
