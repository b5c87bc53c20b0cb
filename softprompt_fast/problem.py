"""One loss to compute, as the engines of the backends receive it."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .logit_transform import LogitTransform


class Problem(NamedTuple):
    """Per-token loss ``alpha * divergence + (1 - alpha) * nll`` and its gradient by ``hidden``.

    T tokens, D and D_t hidden widths, V vocabulary. ``targets`` None: alpha is 1. ``teacher`` None:
    alpha is 0. Without a teacher_weight the teacher shares the student's head.
    """

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor | None  # [T] int64, in range
    label_smoothing: float
    teacher: Tensor | None  # [T, D_t]
    teacher_weight: Tensor | None  # [V, D_t]
    teacher_bias: Tensor | None  # [V]
    beta: float
    alpha: float
    transform: LogitTransform
    with_grad: bool
    workspace_mib: float

    @property
    def heads(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """(hidden, weight, bias) of the student and, where there is one, of the teacher."""
        student = (self.hidden, self.weight, self.bias)
        if self.teacher is None:
            return [student]
        if self.teacher_weight is None:
            return [student, (self.teacher, self.weight, self.bias)]
        return [student, (self.teacher, self.teacher_weight, self.teacher_bias)]

    def tokens(self, keep: Tensor) -> Problem:
        """The same problem over some of its tokens only."""
        return self._replace(
            hidden=self.hidden[keep],
            targets=None if self.targets is None else self.targets[keep],
            teacher=None if self.teacher is None else self.teacher[keep],
        )

    def padded_to_multiple(self, multiple: int) -> Problem:
        """With tokens of zeros at the end."""
        more = -len(self.hidden) % multiple
        if not more:
            return self
        return self._replace(
            hidden=F.pad(self.hidden, (0, 0, 0, more)),
            targets=None if self.targets is None else F.pad(self.targets, (0, more)),
            teacher=None if self.teacher is None else F.pad(self.teacher, (0, 0, 0, more)),
        )
