"""The engine of the triton and cuda backends: logits of a chunk, one row kernel, product back.

The logits are fp32; the row kernel writes their gradient over them in the head's dtype. A teacher
that shares the student's head is projected with the student, so that the head is read once for
both. Nothing here waits for the device: a step can be captured in a CUDA graph.

Legend: T tokens, C rows in a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cuda_rows, gpu_streaming
from .matmul import gradient_dtype, project, project_back
from .problem import NO_TARGET, Problem, check_workspace, round_up

# Rows of logits start at multiples of this many entries: 16-byte accesses whatever V is.
ALIGNMENT = 8
# The products may take another summation order for a handful of rows.
ROW_MULTIPLE = 8
# Chunks are multiples of the products' tiles where they are that long.
TILE_ROWS = 128
# Shorter chunks than this would read the head too often: the streaming engine is faster then.
LEAST_ROWS = 64


def triton_token_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """Triton's row kernels; where the workspace is too small for them, the streaming engine."""
    from ..kernels import rows

    return token_loss(problem, rows) if fits(problem) else gpu_streaming.token_loss(problem)


def cuda_token_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """The row kernels of csrc/cuda."""
    return token_loss(problem, cuda_rows)


def token_loss(problem: Problem, row_kernels: ModuleType) -> tuple[Tensor, Tensor]:
    """loss [T] fp32, dhidden [T, D] fp32 (empty without gradient).

    row_kernels: a module with ``sparse_target_rows_`` and ``divergence_rows_``
    """
    problem = problem.contiguous()
    tokens, width = problem.hidden.shape
    vocabulary = len(problem.head.weight)
    needed = ROW_MULTIPLE * _row_bytes(problem)
    check_workspace(needed, problem.workspace_mib, f"a chunk of {ROW_MULTIPLE} rows")
    empty = problem.hidden.new_empty
    padded = round_up(tokens, ROW_MULTIPLE)
    loss = empty(padded, dtype=torch.float32)
    dhidden = empty((padded if problem.with_grad else 0, width), dtype=torch.float32)
    dz_dtype = gradient_dtype(problem.head.weight)
    unscale = None
    if problem.with_grad and dz_dtype == torch.float16:
        unscale = empty(padded, dtype=torch.float32)

    streams, stride = len(problem.streams), round_up(vocabulary, ALIGNMENT)
    chunk = min(rows_in_chunk(problem), padded)
    buffer = empty(streams * chunk * stride, dtype=torch.float32)
    for start in range(0, tokens, max(chunk, 1)):
        part = problem.slice(start, start + chunk).padded_to_multiple(ROW_MULTIPLE)
        count = len(part.hidden)
        rows = slice(start, start + count)
        logits = buffer[: streams * count * stride].view(streams, count, stride)
        dz = logits[0].view(dz_dtype)[:, :vocabulary] if problem.with_grad else None
        logits = logits[:, :, :vocabulary]
        _project(part, logits)
        factors = None if unscale is None else unscale[rows]
        _row_kernel(part, row_kernels, logits, loss[rows], dz, factors)
        if dz is not None:
            project_back(dz, problem.head.weight, dhidden[rows])
    if unscale is not None:
        dhidden *= unscale.unsqueeze(-1)
    return loss[:tokens], dhidden[:tokens]


def rows_in_chunk(problem: Problem) -> int:
    """As many rows as the workspace holds, in multiples of the products' tiles."""
    rows = int(problem.workspace_mib * 2**20 / _row_bytes(problem))
    return rows // TILE_ROWS * TILE_ROWS or rows // ROW_MULTIPLE * ROW_MULTIPLE


def fits(problem: Problem) -> bool:
    """Does the workspace hold enough rows for this engine to be the faster one?"""
    return rows_in_chunk(problem) >= min(LEAST_ROWS, len(problem.hidden))


def _row_bytes(problem: Problem) -> int:
    """Of the logits, and of student and teacher side by side."""
    weight, streams = problem.head.weight, len(problem.streams)
    logits = 4 * streams * round_up(len(weight), ALIGNMENT)
    return logits + (2 * weight.shape[1] * weight.itemsize if streams == 2 else 0)


def _project(problem: Problem, logits: Tensor) -> None:
    """logits [streams, C, V], raw. The head is read once for both streams, where they share it."""
    if problem.teacher is not None and problem.teacher.head is None:
        both = torch.cat((problem.hidden, problem.teacher.hidden))
        return project(both, problem.head.weight, logits.flatten(0, 1))
    for z, (hidden, head) in zip(logits, problem.streams, strict=True):
        project(hidden, head.weight, z)


def _row_kernel(
    problem: Problem,
    kernels: ModuleType,
    logits: Tensor,
    loss: Tensor,
    dz: Tensor | None,
    unscale: Tensor | None,
) -> None:
    """Fills loss [C], unscale [C] and, over logits[0], dz."""
    target, head = problem.target or NO_TARGET, problem.head
    options: dict[str, Any] = {
        "bias": head.bias,
        "transform": head.transform,
        "keep": problem.keep,
        "unscale": unscale,
    }
    if problem.teacher is None:
        kernels.sparse_target_rows_(logits[0], target, loss, dz, **options)
    else:
        _, (_, teacher_head) = problem.streams
        kernels.divergence_rows_(
            *logits,
            loss,
            dz,
            beta=problem.teacher.beta,
            target=target,
            alpha=problem.alpha,
            teacher_bias=teacher_head.bias,
            **options,
        )
