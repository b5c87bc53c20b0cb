"""The sweeps of the streaming engine over the head: launches of ``kernels/streaming.py``.

Legend: R tokens of a chunk, D hidden width, V vocabulary, K more targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import streaming as kernels
from ..kernels.arguments import (
    Mixture,
    Parts,
    Stream,
    Strip,
    Sums,
    Transform,
    Weights,
    entry_numbers,
)
from ..kernels.formulas import divergence_of
from .matmul import gradient_dtype
from .problem import NO_TARGET, NO_TEACHER, Problem, SparseTarget, round_up


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A problem's tokens as the kernels take them."""

    student: Stream
    teacher: Stream  # without hidden states where the problem has no teacher
    target: SparseTarget
    keep: Tensor | None
    mixture: Mixture
    weights: Weights
    transform: Transform
    divergence: Callable[..., Any]
    R: int
    V: int
    K: int
    entries: int  # a power of two that holds K

    @classmethod
    def of(cls, problem: Problem) -> Chunk:
        streams = [Stream(h, head.weight, head.bias, h.shape[1]) for h, head in problem.streams]
        student, teacher = (*streams, Stream())[:2]
        target = problem.target or NO_TARGET
        K, entries = entry_numbers(target)
        beta = (problem.teacher or NO_TEACHER).beta
        return cls(
            student=student,
            teacher=teacher,
            target=target,
            keep=problem.keep,
            mixture=Mixture.of(beta),
            weights=Weights.of(problem.alpha),
            transform=Transform.of(problem.head.transform),
            divergence=divergence_of(beta),
            R=len(problem.hidden),
            V=len(problem.head.weight),
            K=K,
            entries=entries,
        )

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """shape x R of them, not yet written."""
        numbers: Tensor = self.student.hidden.new_empty(*shape, self.R, dtype=dtype)
        return numbers

    @property
    def part_length(self) -> int:
        """Columns of a part of the vocabulary: whole tiles."""
        parts: int = kernels.PARTS.value
        columns: int = kernels.tiles(self.student.weight.dtype)["COLUMNS"]
        return round_up(self.V, parts * columns) // parts

    def grid_of_parts(self, tiles: dict[str, Any]) -> tuple[int, int]:
        return -(-self.R // tiles["ROWS"]), kernels.PARTS.value

    def grid(self, tiles: dict[str, Any], columns: int) -> tuple[int, int]:
        """Neighbouring programs share columns of the head."""
        return -(-self.R // tiles["ROWS"]), -(-columns // tiles["COLUMNS"])


def softmax(chunk: Chunk) -> tuple[Tensor, Tensor | None]:
    """The softmax of every stream and the student's peak: a sweep for each.

    statistics [STATISTICS, R], z_more [R, K]: the logits of the more targets
    """

    def part(wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return chunk.numbers(kernels.PARTS.value, dtype=dtype) if wanted else None

    target, teacher = chunk.target, chunk.teacher
    has_label, has_teacher = target.ids is not None, teacher.hidden is not None
    parts = Parts(
        tops=part(),
        totals=part(),
        others=part(has_label),
        sums_z=part(target.smoothing is not None),
        peaks=part(has_teacher, torch.int32),
        z_targets=chunk.numbers() if has_label else None,
    )
    _statistics_(chunk, chunk.student, parts, target.ids)
    z_more = _entries(chunk)
    parts_p = Parts(tops=part(has_teacher), totals=part(has_teacher))
    if has_teacher:
        _statistics_(chunk, teacher, parts_p, None)
    statistics = chunk.numbers(kernels.STATISTICS)
    kernels.finish_kernel[(chunk.R,)](
        statistics,
        parts,
        parts_p,
        target,
        z_more,
        teacher,
        chunk.transform,
        chunk.R,
        chunk.V,
        chunk.K,
        ENTRIES=chunk.entries,
        DEPTH=kernels.DEPTH_OF_ROW,
        **kernels.ROW_OPTIONS,
    )
    return statistics, z_more


def _statistics_(chunk: Chunk, stream: Stream, parts: Parts, targets: Tensor | None) -> None:
    """Fills the parts of one stream."""
    tiles = kernels.tiles(stream.weight.dtype)
    kernels.statistics_kernel[chunk.grid_of_parts(tiles)](
        parts,
        targets,
        chunk.R,
        chunk.V,
        chunk.part_length,
        chunk.transform,
        stream,
        **tiles,
    )


def _entries(chunk: Chunk) -> Tensor | None:
    """z_more, where there are more targets."""
    target, together = chunk.target, kernels.ENTRIES_TOGETHER
    if target.more is None:
        return None
    z_more = torch.empty_like(target.more, dtype=torch.float32)
    if chunk.K:
        kernels.entries_kernel[(chunk.R, -(-chunk.K // together))](
            z_more,
            target,
            chunk.student,
            chunk.transform,
            chunk.V,
            chunk.K,
            ENTRIES=together,
            DEPTH=kernels.DEPTH_OF_ROW,
            **kernels.ROW_OPTIONS,
        )
    return z_more


def loss_(chunk: Chunk, statistics: Tensor, loss: Tensor) -> None:
    """The loss, and in statistics what the gradient needs: another sweep for a divergence."""
    dtype = chunk.student.weight.dtype
    sums = Sums()
    if chunk.teacher.hidden is not None:
        sums = Sums(*(chunk.numbers(kernels.PARTS.value) for _ in Sums._fields))
        tiles = kernels.tiles(dtype, chunk.divergence)
        kernels.measure_kernel[chunk.grid_of_parts(tiles)](
            sums,
            statistics,
            chunk.student,
            chunk.teacher,
            chunk.mixture,
            chunk.transform,
            chunk.R,
            chunk.V,
            chunk.part_length,
            divergence=chunk.divergence,
            **tiles,
        )
    kernels.finish_sums_kernel[(chunk.R,)](
        statistics,
        loss,
        sums,
        chunk.target.ids,
        chunk.keep,
        chunk.weights,
        chunk.transform.slope,
        chunk.R,
        SCALED=gradient_dtype(chunk.student.weight) == torch.float16,
        **kernels.ROW_OPTIONS,
    )


def gradient_(
    chunk: Chunk, statistics: Tensor, z_more: Tensor | None, dhidden: Tensor, width: int
) -> None:
    """dh [R, D], from one strip of dz, ``width`` columns, after another."""
    weight, D = chunk.student.weight, chunk.student.D
    dz = weight.new_empty(chunk.R, width, dtype=gradient_dtype(weight))
    tiles = kernels.tiles(weight.dtype, chunk.divergence)
    product_tiles = kernels.tiles(dz.dtype)
    for first in range(0, chunk.V, width):
        strip = Strip(dz, first, width)
        columns = min(width, chunk.V - first)
        kernels.gradient_kernel[chunk.grid(tiles, columns)](
            strip,
            statistics,
            chunk.student,
            chunk.teacher,
            chunk.target,
            chunk.keep,
            chunk.mixture,
            chunk.weights,
            chunk.transform,
            chunk.R,
            chunk.V,
            divergence=chunk.divergence,
            **tiles,
        )
        if chunk.K:
            kernels.masses_kernel[(chunk.R,)](
                strip,
                statistics,
                chunk.target,
                z_more,
                chunk.keep,
                chunk.transform,
                chunk.R,
                chunk.V,
                chunk.K,
                ENTRIES=chunk.entries,
                **kernels.ROW_OPTIONS,
            )
        kernels.accumulate_kernel[chunk.grid(product_tiles, D)](
            dhidden,
            strip,
            weight,
            statistics,
            int(first + width >= chunk.V),
            chunk.R,
            chunk.V,
            D,
            SUM=kernels.SUM,
            **product_tiles,
        )
