"""One loss to compute, as the engines of the backends receive it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .formulas import LogitTransform


class Problem(NamedTuple):
    """Per-token loss ``alpha * divergence + (1 - alpha) * nll`` and its gradient by ``hidden``.

    T tokens, D and D_t hidden widths, V vocabulary, K entries. ``targets`` None: alpha is 1.
    ``teacher`` None: alpha is 0. Without a teacher_weight the teacher shares the student's head.

    A target distribution with several entries comes without a teacher. It has masses[:, 1:] on
    more_targets, label_smoothing spread over the vocabulary, masses[:, 0] on a tail whose share of
    the logits is added outside of the engines, and what is left of 1 on ``targets``. Entries whose
    mass is 0 are not looked at.
    """

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor | None  # [T] int64, in range where keep is True
    keep: Tensor | None  # [T] bool, the tokens that count; None: all
    label_smoothing: float
    teacher: Tensor | None  # [T, D_t]
    teacher_weight: Tensor | None  # [V, D_t]
    teacher_bias: Tensor | None  # [V]
    beta: float
    alpha: float
    transform: LogitTransform
    with_grad: bool
    workspace_mib: float
    more_targets: Tensor | None = None  # [T, K] int64, no entry twice
    masses: Tensor | None = None  # [T, 1 + K] fp32

    @property
    def heads(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(hidden, weight, bias) of the student and, where there is one, of the teacher."""
        student = (self.hidden, self.weight, self.bias)
        if self.teacher is None:
            return [student]
        if self.teacher_weight is None:
            return [student, (self.teacher, self.weight, self.bias)]
        return [student, (self.teacher, self.teacher_weight, self.teacher_bias)]

    def kept_tokens(self) -> Problem:
        """The same problem over the tokens that count."""
        return self.per_token(lambda value: value[self.keep])._replace(keep=None)

    def slice(self, start: int, stop: int) -> Problem:
        """The tokens from start on, up to stop or to the end."""
        return self.per_token(lambda value: value[start:stop])

    def contiguous(self) -> Problem:
        """With every tensor dense and row-major."""
        tensors = {n: v for n, v in self._asdict().items() if isinstance(v, Tensor)}
        return self._changed(tensors, Tensor.contiguous)

    def padded_to_multiple(self, multiple: int) -> Problem:
        """With tokens of zeros at the end."""
        more = -len(self.hidden) % multiple
        if not more:
            return self
        return self.per_token(lambda value: F.pad(value, (0, 0) * (value.dim() - 1) + (0, more)))

    def per_token(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """With ``change`` applied to whatever has an entry per token."""
        names = ("hidden", "targets", "more_targets", "masses", "keep", "teacher")
        return self._changed({n: getattr(self, n) for n in names}, change)

    def _changed(
        self, tensors: Mapping[str, Tensor | None], change: Callable[[Tensor], Tensor]
    ) -> Problem:
        changed: Any = {n: change(v) for n, v in tensors.items() if v is not None}
        return self._replace(**changed)


def round_up(count: int, multiple: int) -> int:
    """The next multiple, or ``count`` itself where it is one."""
    return -(-count // multiple) * multiple


def check_workspace(needed_bytes: float, workspace_mib: float, what: str) -> None:
    """The smallest piece of work must fit the workspace."""
    if needed_bytes > workspace_mib * 2**20:
        raise ValueError(
            f"workspace_mib={workspace_mib:g} is too small: {what} needs "
            f"{math.ceil(needed_bytes / 2**20)} MiB."
        )
