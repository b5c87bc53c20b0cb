"""The engine of the streaming backend: Triton kernels that compute logits wherever they need them.

Memory is a few numbers per token and a strip of the gradient by the logits, never a row of them;
``kernels/streaming.py`` has the sweeps. It reads the head more often than the engine of whole rows
(``gpu.py``), and takes over from it where the workspace is too small for that.

Legend: T tokens, R of them at a time, D hidden width, V vocabulary, K more targets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .matmul import gradient_dtype
from .problem import NO_TARGET, NO_TEACHER, Problem, check_workspace, round_up

# Terms that are summed before they are added to dh; strips are multiples of it.
SUM = 2048
# A strip this wide fills the chip whatever R is.
WIDEST_STRIP = 16 * SUM
LEAST_ROWS = 8
# fp32 numbers that a row's statistics take in every part of the vocabulary: two streams and a peak.
NUMBERS_PER_PART = 7


class Plan(NamedTuple):
    """How the workspace is spent."""

    rows: int  # R
    strip: int  # columns of dz


def token_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """loss [T] fp32, dhidden [T, D] fp32 (empty without gradient)."""
    problem = problem.contiguous()
    tokens, width = problem.hidden.shape
    empty = problem.hidden.new_empty
    loss = empty(tokens, dtype=torch.float32)
    dhidden = empty((tokens if problem.with_grad else 0, width), dtype=torch.float32)
    plan = plan_workspace(problem)
    for start in range(0, tokens, plan.rows):
        rows = slice(start, start + plan.rows)
        sweeps = Sweeps(problem.slice(start, start + plan.rows))
        sweeps.softmax()
        sweeps.loss_(loss[rows])
        if problem.with_grad:
            sweeps.gradient_(dhidden[rows], plan.strip)
    return loss, dhidden


def plan_workspace(problem: Problem) -> Plan:
    """All rows with the widest strip that fits, else the narrowest strip and fewer rows."""
    from ..kernels import formulas
    from ..kernels import streaming as kernels

    K, _ = formulas.entry_numbers((problem.target or NO_TARGET).more)
    numbers = NUMBERS_PER_PART * kernels.PARTS.value + kernels.STATISTICS + 1 + K
    column_bytes = gradient_dtype(problem.head.weight).itemsize if problem.with_grad else 0
    budget = problem.workspace_mib * 2**20
    row_bytes = 4 * numbers + SUM * column_bytes
    check_workspace(LEAST_ROWS * row_bytes, problem.workspace_mib, f"a chunk of {LEAST_ROWS} rows")
    rows = max(1, min(int(budget / row_bytes), len(problem.hidden)))
    if not problem.with_grad:
        return Plan(rows, 0)
    widest = min(WIDEST_STRIP, round_up(len(problem.head.weight), SUM))
    strip = int((budget / rows - 4 * numbers) / column_bytes) // SUM * SUM
    return Plan(rows, min(strip, widest))


class Sweeps:
    """The sweeps over the head for R tokens, and what they leave behind."""

    def __init__(self, problem: Problem):
        from ..kernels import formulas, streaming

        self.kernels = streaming
        self.problem = problem
        self.T, self.V = len(problem.hidden), len(problem.head.weight)
        self.target = problem.target or NO_TARGET
        streams = [(hidden, head.weight, head.bias) for hidden, head in problem.streams]
        self.student, self.teacher = (*streams, (None, None, None))[:2]
        self.D_t = 0 if problem.teacher is None else problem.teacher.hidden.shape[1]
        self.scale, self.cap, self.slope = formulas.transform_numbers(*problem.head.transform)
        self.label_smoothing = self.target.smoothing or None
        self.alpha = problem.alpha
        beta = (problem.teacher or NO_TEACHER).beta
        self.mixture = formulas.mixture_numbers(beta)
        self.divergence = formulas.divergence_of(beta)
        dtype = problem.head.weight.dtype
        self.tiles = streaming.tiles(dtype)
        self.divergence_tiles = streaming.tiles(dtype, self.divergence)
        self.dz_dtype = gradient_dtype(problem.head.weight)
        self.product_tiles = streaming.tiles(self.dz_dtype)
        parts, columns = streaming.PARTS.value, self.tiles["COLUMNS"]
        self.part_length = round_up(self.V, parts * columns) // parts
        self.statistics = self._numbers(streaming.STATISTICS)
        self.K, self.entries = formulas.entry_numbers(self.target.more)
        self.z_more = None
        if self.target.more is not None:
            self.z_more = problem.hidden.new_empty(self.T, self.K, dtype=torch.float32)

    def softmax(self) -> None:
        """The softmax of every stream, and the student's peak: a sweep for each."""
        p = self.problem
        part = self._parts
        parts: dict[str, Tensor | None] = {"tops": part(), "totals": part()}
        parts["others"] = None if self.target.ids is None else part()
        parts["sums_z"] = None if self.label_smoothing is None else part()
        parts["peaks"] = None if p.teacher is None else part(torch.int32)
        parts["z_targets"] = None if self.target.ids is None else self._numbers()
        self._softmax_of(self.student, self.target.ids, parts)
        if self.K:
            self._entries_()
        parts_p = dict.fromkeys(parts)
        if p.teacher is not None:
            parts_p.update(tops=part(), totals=part())
            self._softmax_of(self.teacher, None, parts_p)
        self.kernels.finish_kernel[(self.T,)](
            self.statistics,
            *parts.values(),
            self.target.ids,
            self.target.masses,
            self.z_more,
            parts_p["tops"],
            parts_p["totals"],
            *self.teacher,
            self.T,
            self.V,
            self.D_t,
            self.K,
            self.label_smoothing,
            self.scale,
            self.cap,
            ENTRIES=self.entries,
            DEPTH=self.kernels.DEPTH_OF_ROW,
            **self.kernels.ROW_OPTIONS,
        )

    def _softmax_of(self, head: Any, targets: Tensor | None, parts: dict[str, Any]) -> None:
        hidden, weight, bias = head
        self.kernels.statistics_kernel[self._parts_grid(self.tiles)](
            hidden,
            weight,
            bias,
            targets,
            *parts.values(),
            self.T,
            self.V,
            hidden.shape[1],
            self.part_length,
            self.scale,
            self.cap,
            **self.tiles,
        )

    def loss_(self, loss: Tensor) -> None:
        """The loss, and the sums that the gradient needs: another sweep for a divergence."""
        p = self.problem
        sums: list[Tensor | None] = [None, None, None]
        if p.teacher is not None:
            sums = [self._parts() for _ in range(3)]
            tiles = self.divergence_tiles
            self.kernels.measure_kernel[self._parts_grid(tiles)](
                *self.student,
                *self.teacher,
                self.statistics,
                *sums,
                self.T,
                self.V,
                p.hidden.shape[1],
                self.D_t,
                self.part_length,
                *self.mixture,
                self.scale,
                self.cap,
                divergence=self.divergence,
                **tiles,
            )
        self.kernels.finish_sums_kernel[(self.T,)](
            self.statistics,
            *sums,
            self.target.ids,
            p.keep,
            loss,
            self.T,
            self.alpha,
            1 - self.alpha,
            self.slope,
            SCALED=self.dz_dtype == torch.float16,
            **self.kernels.ROW_OPTIONS,
        )

    def gradient_(self, dhidden: Tensor, strip: int) -> None:
        """dh, from one strip of dz after another."""
        p = self.problem
        width, tiles = p.hidden.shape[1], self.divergence_tiles
        dz = p.hidden.new_empty(self.T, strip, dtype=self.dz_dtype)
        for first in range(0, self.V, strip):
            columns = min(strip, self.V - first)
            self.kernels.gradient_kernel[self._grid(tiles, columns)](
                *self.student,
                *self.teacher,
                self.statistics,
                self.target.ids,
                p.keep,
                dz,
                first,
                strip,
                self.T,
                self.V,
                width,
                self.D_t,
                self.label_smoothing,
                *self.mixture,
                self.alpha,
                1 - self.alpha,
                self.scale,
                self.cap,
                self.slope,
                divergence=self.divergence,
                **tiles,
            )
            if self.K:
                self._masses_(dz, first)
            product = self.product_tiles
            self.kernels.accumulate_kernel[self._grid(product, width)](
                dz,
                p.head.weight,
                self.statistics,
                dhidden,
                first,
                strip,
                int(first + strip >= self.V),
                self.T,
                self.V,
                width,
                SUM=SUM,
                **product,
            )

    def _entries_(self) -> None:
        """Fills z_more [R, K]: the logits of more_targets."""
        p, together = self.problem, self.kernels.ENTRIES_TOGETHER
        self.kernels.entries_kernel[(self.T, -(-self.K // together))](
            *self.student,
            self.target.more,
            self.target.masses,
            self.z_more,
            self.V,
            p.hidden.shape[1],
            self.K,
            self.scale,
            self.cap,
            ENTRIES=together,
            DEPTH=self.kernels.DEPTH_OF_ROW,
            **self.kernels.ROW_OPTIONS,
        )

    def _masses_(self, dz: Tensor, first: int) -> None:
        """Takes the masses of more_targets off dz, the strip that begins at column ``first``."""
        p = self.problem
        self.kernels.masses_kernel[(self.T,)](
            self.statistics,
            self.target.more,
            self.target.masses,
            self.z_more,
            p.keep,
            dz,
            first,
            dz.shape[1],
            self.T,
            self.V,
            self.K,
            self.label_smoothing,
            self.cap,
            self.slope,
            ENTRIES=self.entries,
            **self.kernels.ROW_OPTIONS,
        )

    def _grid(self, tiles: dict[str, Any], columns: int) -> tuple[int, int]:
        """Neighbouring programs share columns of the head."""
        return -(-self.T // tiles["ROWS"]), -(-columns // tiles["COLUMNS"])

    def _parts_grid(self, tiles: dict[str, Any]) -> tuple[int, int]:
        return -(-self.T // tiles["ROWS"]), self.kernels.PARTS.value

    def _numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.problem.hidden.new_empty(*shape, self.T, dtype=dtype)

    def _parts(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._numbers(self.kernels.PARTS.value, dtype=dtype)
