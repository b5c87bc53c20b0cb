"""One loss to compute: the public functions build it, the op carries it, the engines receive it.

Legend: T tokens, D and D_t hidden widths, V vocabulary, K entries beside the first one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from types import NoneType
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_type_hints

import torch.nn.functional as F
from torch import Tensor

from .formulas import IDENTITY, LogitTransform

Fields = TypeVar("Fields", bound=tuple[Any, ...])


class Head(NamedTuple):
    """``logits = transform(W h + b)``, frozen."""

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    transform: LogitTransform = IDENTITY


class Tail(NamedTuple):
    """What a sketch leaves out of its entries. The op takes it off the engine's loss and gradient:

    weight (logit_scale / temperature (hidden . moment) + constant), linear in the hidden state.
    """

    moment: Tensor  # [T, D] fp32
    constant: Tensor  # [T] fp64
    weight: float


class SparseTarget(NamedTuple):
    """A distribution with few entries: a label, a smoothed label, or a sketch of the teacher.

    It has masses[:, 1:] on ``more``, ``smoothing`` spread over the vocabulary, masses[:, 0] on the
    tail, and what is left of 1 on ``ids``. Entries whose mass is 0 are not looked at.

    The engines in C++, CUDA and Triton take these fields as they come: a new one reaches them.
    """

    ids: Tensor  # [T] int64, in range where keep is True
    more: Tensor | None = None  # [T, K] int64, no entry twice
    masses: Tensor | None = None  # [T, 1 + K] fp32
    smoothing: float | None = None
    tail: Tail | None = None

    def entries(self) -> list[Any]:
        """Every field but the tail, which is the op's."""
        return [value for name, value in self._asdict().items() if name != "tail"]


class HiddenTeacher(NamedTuple):
    """A distribution given by hidden states and a head."""

    hidden: Tensor  # [T, D_t]
    head: Head | None = None  # None: the student's own
    beta: float = 0.0  # of the divergence from it


# What engines in other languages are handed in the place of a part that is absent.
NO_TARGET = SparseTarget(cast(Any, None))
NO_TEACHER = HiddenTeacher(cast(Any, None))


class Problem(NamedTuple):
    """Per-token loss ``alpha * divergence + (1 - alpha) * cross-entropy``, and its gradient.

    Without a target alpha is 1, without a teacher 0.
    """

    hidden: Tensor  # [T, D]
    head: Head
    target: SparseTarget | None = None
    teacher: HiddenTeacher | None = None
    alpha: float = 0.0
    keep: Tensor | None = None  # [T] bool, the tokens that count; None: all
    with_grad: bool = True
    workspace_mib: float = 256

    @property
    def streams(self) -> list[tuple[Tensor, Head]]:
        """Hidden states and head of the student and, where there is one, of the teacher."""
        student = (self.hidden, self.head)
        if self.teacher is None:
            return [student]
        return [student, (self.teacher.hidden, self.teacher.head or self.head)]

    def kept_tokens(self) -> Problem:
        """The same problem over the tokens that count."""
        return self.per_token(lambda value: value[self.keep])._replace(keep=None)

    def slice(self, start: int, stop: int) -> Problem:
        """The tokens from start on, up to stop or to the end."""
        return self.per_token(lambda value: value[start:stop])

    def contiguous(self) -> Problem:
        """With every tensor dense and row-major."""
        dense = (v.contiguous() if isinstance(v, Tensor) else v for v in flatten(self))
        return unflatten(dense)

    def padded_to_multiple(self, multiple: int) -> Problem:
        """With tokens of zeros at the end."""
        more = -len(self.hidden) % multiple
        if not more:
            return self
        return self.per_token(lambda value: F.pad(value, (0, 0) * (value.dim() - 1) + (0, more)))

    def per_token(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """With ``change`` applied to whatever has an entry per token."""
        changed = _changed(self, ("hidden", "keep"), change)
        if changed.target is not None:
            target = _changed(changed.target, ("ids", "more", "masses"), change)
            if target.tail is not None:
                tail = _changed(target.tail, ("moment", "constant"), change)
                target = target._replace(tail=tail)
            changed = changed._replace(target=target)
        if changed.teacher is not None:
            changed = changed._replace(teacher=_changed(changed.teacher, ("hidden",), change))
        return changed


def _changed(value: Fields, names: Iterable[str], change: Callable[[Tensor], Tensor]) -> Fields:
    given = {name: getattr(value, name) for name in names}
    replace: Callable[..., Fields] = getattr(value, "_replace")  # noqa: B009
    return replace(**{n: change(v) for n, v in given.items() if v is not None})


class _Field(NamedTuple):
    name: str
    kind: type
    is_optional: bool
    is_group: bool  # a NamedTuple of its own


def _fields(group: type) -> list[_Field]:
    fields = []
    for name, hint in get_type_hints(group).items():
        kinds = get_args(hint) or (hint,)
        kind = next(kind for kind in kinds if kind is not NoneType)
        fields.append(_Field(name, kind, NoneType in kinds, issubclass(kind, tuple)))
    return fields


FIELDS: dict[type, list[_Field]] = {
    group: _fields(group)
    for group in (Problem, Head, LogitTransform, SparseTarget, Tail, HiddenTeacher)
}
SCHEMA_TYPES = {Tensor: "Tensor", float: "float", bool: "bool"}


def schema(group: type = Problem, prefix: str = "", *, is_optional: bool = False) -> list[str]:
    """The arguments of an op that takes a flattened problem, depth first, as PyTorch declares them.

    What belongs to a group that may be absent may be None.
    """
    arguments = []
    for field in FIELDS[group]:
        name, may_be_none = prefix + field.name, is_optional or field.is_optional
        if field.is_group:
            arguments += schema(field.kind, f"{name}_", is_optional=may_be_none)
        else:
            arguments.append(f"{SCHEMA_TYPES[field.kind]}{'?' * may_be_none} {name}")
    return arguments


def flatten(value: Problem | None, group: type = Problem) -> list[Any]:
    """What a problem holds, in the order of ``schema``; of an absent group, Nones."""
    leaves = []
    for field in FIELDS[group]:
        item = None if value is None else getattr(value, field.name)
        if field.is_group:
            leaves += flatten(item, field.kind)
        else:
            leaves.append(item)
    return leaves


def unflatten(leaves: Iterable[Any]) -> Problem:
    """The problem of which ``flatten`` made these."""
    problem: Problem = _unflatten(Problem, iter(leaves))
    return problem


def _unflatten(group: Any, leaves: Iterator[Any]) -> Any:
    values = []
    for field in FIELDS[group]:
        value = _unflatten(field.kind, leaves) if field.is_group else next(leaves)
        # the first of an optional group's values is a tensor, unless the group is absent
        is_absent = field.is_group and field.is_optional and value[0] is None
        values.append(None if is_absent else value)
    return group(*values)


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
