"""The engine of the row-kernel backends: logits of a chunk, row kernel, gradient of the chunk.

Legend: T tokens, C rows in a chunk, D hidden width, V vocabulary. Logits are fp32 whatever the
inputs are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .problem import Problem
from .rows import divergence_rows, sparse_target_rows

# A matrix product may take another summation order for a handful of rows; a multiple of this many
# rows keeps a token's loss the same in whatever batch it sits (measured on MKL: 1, 2, 3 and 5
# differ).
ROW_MULTIPLE = 8
# [C, V] fp32 buffers alive at once in the row kernels: targets alone, and with a teacher.
BUFFERS_NLL = 7
BUFFERS_DIVERGENCE = 20


def token_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """loss [T] fp32, dhidden [T, D] fp32 (empty without gradient)."""
    tokens = len(problem.hidden)
    problem = problem.padded_to_multiple(ROW_MULTIPLE)
    hidden = problem.hidden
    loss = hidden.new_empty(len(hidden), dtype=torch.float32)
    with_grad = len(hidden) if problem.with_grad else 0
    dhidden = hidden.new_empty((with_grad, hidden.shape[1]), dtype=torch.float32)
    step = chunk_rows(problem)
    for start in range(0, len(hidden), step):
        _chunk(problem, slice(start, start + step), loss, dhidden)
    return loss[:tokens], dhidden[:tokens]


def chunk_rows(problem: Problem) -> int:
    """As many rows as the workspace holds, a multiple of ROW_MULTIPLE."""
    buffers = BUFFERS_NLL if problem.teacher is None else BUFFERS_DIVERGENCE
    row_bytes = 4 * len(problem.weight) * buffers
    checks.workspace(
        ROW_MULTIPLE * row_bytes, problem.workspace_mib, f"a chunk of {ROW_MULTIPLE} rows"
    )
    return int(problem.workspace_mib * 2**20) // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE


def _chunk(problem: Problem, rows: slice, loss: Tensor, dhidden: Tensor) -> None:
    """Fill loss[rows] and, where the gradient is wanted, dhidden[rows]."""
    z, *teacher = (
        _logits(hidden[rows], weight, bias, problem) for hidden, weight, bias in problem.heads
    )
    if problem.targets is None:
        loss[rows], dz = divergence_rows(z, teacher[0], problem.beta)
    elif not teacher:
        loss[rows], dz = sparse_target_rows(z, problem.targets[rows], problem.label_smoothing)
    else:
        nll, dz_nll = sparse_target_rows(z, problem.targets[rows], problem.label_smoothing)
        kl, dz = divergence_rows(z, teacher[0], problem.beta)
        loss[rows] = problem.alpha * kl + (1 - problem.alpha) * nll
        dz.mul_(problem.alpha).add_(dz_nll, alpha=1 - problem.alpha)
    if problem.with_grad:
        dz.mul_(problem.transform.slope(z))
        out = dhidden[rows].zero_()
        for block in _vocabulary_blocks(problem.weight, problem.workspace_mib):
            out.addmm_(dz[:, block], problem.weight[block].float())


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """[C, D] -> finished logits [C, V] fp32."""
    raw = hidden.new_empty((len(hidden), len(weight)), dtype=torch.float32)
    for block in _vocabulary_blocks(weight, problem.workspace_mib):
        raw[:, block] = hidden.float() @ weight[block].float().T
    return problem.transform(raw if bias is None else raw.add_(bias))


def _vocabulary_blocks(weight: Tensor, workspace_mib: float) -> list[slice]:
    """The whole head where it is fp32, else blocks that take an eighth of the workspace in fp32."""
    vocabulary, width = weight.shape
    if weight.dtype == torch.float32:
        return [slice(0, vocabulary)]
    step = max(1, int(workspace_mib * 2**20) // 8 // (4 * width))
    return [slice(start, start + step) for start in range(0, vocabulary, step)]
