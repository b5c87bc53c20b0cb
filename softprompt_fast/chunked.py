"""The engine of the row-kernel backends: logits of a chunk, row kernel, gradient of the chunk.

Legend: T tokens, C rows in a chunk, D hidden width, V vocabulary. Logits are fp32 whatever the
inputs are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .problem import Problem
from .rows import divergence_rows, sparse_target_rows

# A matrix product may take another summation order for a handful of rows; a multiple of this many
# rows keeps a token's loss the same in whatever batch it sits (measured on MKL: 1, 2, 3 and 5
# differ).
ROW_MULTIPLE = 8
# [C, V] fp32 buffers alive at once in the row kernels: targets alone, and with a teacher.
BUFFERS_NLL = 4
BUFFERS_DIVERGENCE = 14


def token_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """loss [T] fp32, dhidden [T, D] fp32 (empty without gradient)."""
    hidden = problem.hidden
    tokens, width = hidden.shape
    loss = hidden.new_empty(tokens, dtype=torch.float32)
    dhidden = hidden.new_empty((tokens if problem.with_grad else 0, width), dtype=torch.float32)
    step = chunk_rows(problem)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        dz = _chunk(problem, rows, loss)
        if problem.with_grad:
            dhidden[rows] = _times_head(dz, problem.weight, problem.workspace_mib)
    return loss, dhidden


def chunk_rows(problem: Problem) -> int:
    """As many rows as the workspace holds, a multiple of ROW_MULTIPLE."""
    buffers = BUFFERS_NLL if problem.teacher is None else BUFFERS_DIVERGENCE
    row_bytes = 4 * problem.weight.shape[0] * buffers
    checks.workspace(
        ROW_MULTIPLE * row_bytes, problem.workspace_mib, f"a chunk of {ROW_MULTIPLE} rows"
    )
    return int(problem.workspace_mib * 2**20) // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE


def _chunk(problem: Problem, rows: slice, loss: Tensor) -> Tensor:
    """Fill loss[rows]; return the gradient by the raw product, [C, V]."""
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
    return dz.mul_(problem.transform.slope(z))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """[C, D] -> finished logits [C, V] fp32."""
    rows = hidden.shape[0]
    padded = F.pad(hidden, (0, 0, 0, -rows % ROW_MULTIPLE))
    raw = padded.new_empty((padded.shape[0], weight.shape[0]), dtype=torch.float32)
    for block in _vocabulary_blocks(weight, problem.workspace_mib):
        raw[:, block] = padded.float() @ weight[block].float().T
    raw = raw[:rows]
    return problem.transform(raw if bias is None else raw.add_(bias))


def _times_head(dz: Tensor, weight: Tensor, workspace_mib: float) -> Tensor:
    """[C, V] @ [V, D] -> [C, D] fp32."""
    rows = dz.shape[0]
    padded = F.pad(dz, (0, 0, 0, -rows % ROW_MULTIPLE))
    out = dz.new_zeros((padded.shape[0], weight.shape[1]))
    for block in _vocabulary_blocks(weight, workspace_mib):
        out.addmm_(padded[:, block], weight[block].float())
    return out[:rows]


def _vocabulary_blocks(weight: Tensor, workspace_mib: float) -> list[slice]:
    """The whole head where it is fp32, else blocks that take an eighth of the workspace in fp32."""
    vocabulary, width = weight.shape
    if weight.dtype == torch.float32:
        return [slice(0, vocabulary)]
    step = max(1, int(workspace_mib * 2**20) // 8 // (4 * width))
    return [slice(start, start + step) for start in range(0, vocabulary, step)]
