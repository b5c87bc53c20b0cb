"""Every check on a teacher sketch; an error names the field, its value and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..backends.problem import SparseTarget
from . import checks
from .options import LossOptions, check_options

if TYPE_CHECKING:
    from .sketch import TeacherSketch

REMEDY = "Keep the teacher's hidden states instead: they serve every divergence and transform."
# What probabilities may add up to, as fp32 numbers rounded one by one.
SUM_TOLERANCE = 1e-3


def fields(sketch: TeacherSketch) -> None:
    """Dtypes and shapes that belong together."""
    for name in ("ids", "probs", "tail", "moment", "tail_bias", "entropy"):
        value = getattr(sketch, name)
        checks.tensor(f"the sketch's {name}", value)
        dtype = {"ids": torch.int32, "entropy": torch.float64}.get(name, torch.float32)
        if value.dtype != dtype or value.requires_grad:
            grad = " that requires grad" if value.requires_grad else ""
            raise TypeError(
                f"the sketch's {name} must be a constant {dtype}: got {value.dtype}{grad}."
            )
    tokens = sketch.tail.shape
    for name in ("ids", "probs", "moment"):
        shape = getattr(sketch, name).shape
        if shape[:-1] != tokens or len(shape) != len(tokens) + 1 or not shape[-1]:
            raise ValueError(
                f"the sketch's {name} must have shape [..., n] beside tail [...] = "
                f"{tuple(tokens)}: got {tuple(shape)}."
            )
    for name, like in (("probs", "ids"), ("tail_bias", "tail"), ("entropy", "tail")):
        shape, other = getattr(sketch, name).shape, getattr(sketch, like).shape
        if shape != other:
            raise ValueError(
                f"the sketch's {name} must have the shape of {like}, {tuple(other)}: "
                f"got {tuple(shape)}."
            )
    check_options(logit_scale=sketch.logit_scale, temperature=sketch.temperature)


def same_options(sketch: TeacherSketch, other: TeacherSketch) -> None:
    for name in ("logit_scale", "temperature"):
        ours, theirs = getattr(sketch, name), getattr(other, name)
        if ours != theirs:
            raise ValueError(f"sketches of different {name} cannot be joined: {ours} and {theirs}.")


def fits_loss(
    sketch: TeacherSketch,
    hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None,
    beta: float,
    options: LossOptions,
) -> None:
    """The sketch is exact for this loss, and lies beside its hidden states."""
    if beta != 0:
        raise ValueError(f"a TeacherSketch gives forward KL only: got beta={beta}. {REMEDY}")
    if options.softcap is not None:
        raise ValueError(
            f"a TeacherSketch needs a linear head: got softcap={options.softcap}. {REMEDY}"
        )
    for name in ("temperature", "logit_scale"):
        ours, theirs = getattr(options, name), getattr(sketch, name)
        if ours != theirs:
            raise ValueError(
                f"the TeacherSketch was made with {name}={theirs}: got {name}={ours}. "
                f"Sketch again with it. {REMEDY}"
            )
    if teacher_weight is not None:
        raise ValueError(
            "a TeacherSketch takes no teacher_weight: it was made over the head that teacher and "
            f"student share. {REMEDY}"
        )
    if sketch.tail.shape != hidden.shape[:-1]:
        raise ValueError(
            f"teacher and hidden disagree on tokens: a sketch of {tuple(sketch.tail.shape)} "
            f"against {tuple(hidden.shape)}."
        )
    if sketch.moment.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"the sketch's moment and weight disagree on the hidden width D: "
            f"{tuple(sketch.moment.shape)} against {tuple(weight.shape)}."
        )
    if sketch.ids.shape[-1] > weight.shape[0]:
        raise ValueError(
            f"the sketch has {sketch.ids.shape[-1]} entries a token: weight has only "
            f"{weight.shape[0]}."
        )
    if sketch.tail.device != hidden.device:
        raise ValueError(
            f"the sketch is on {sketch.tail.device} but the hidden states are on {hidden.device}: "
            "move one of them."
        )


def entries(target: SparseTarget, keep: Tensor | None, vocabulary: int) -> None:
    """Distinct ids in the vocabulary, with a distribution, in a target of several entries.

    Looks at the values, so only where the host has them.
    """
    assert target.more is not None
    assert target.masses is not None
    masses = target.masses
    ids = torch.cat([target.ids.unsqueeze(-1), target.more], -1)
    looked_at = torch.cat([torch.ones_like(masses[:, :1]), masses[:, 1:]], -1) > 0
    wrong = ~((masses >= 0).all(-1) & (masses.sum(-1) <= 1 + SUM_TOLERANCE))
    if keep is not None:
        looked_at &= keep.unsqueeze(-1)
        wrong &= keep
    outside = looked_at & ((ids < 0) | (ids >= vocabulary))
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise IndexError(
            f"token {row}: the id {int(ids[row, column])} is outside the vocabulary: the "
            f"sketch's ids and the targets must be in [0, {vocabulary})."
        )
    absent = -1 - torch.arange(ids.shape[-1], device=ids.device)
    ordered = torch.where(looked_at, ids, absent).sort(-1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        row, column = twice.nonzero()[0].tolist()
        raise ValueError(
            f"token {row}: the sketch's ids hold {int(ordered[row, column])} twice; an entry has "
            "one probability."
        )
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"token {row}: the sketch is no distribution: its probabilities must be >= 0 and add "
            f"up to 1 with the tail, got a tail of {masses[row, 0]:g} and "
            f"{masses[row, 1:].sum():g} beside the first."
        )
