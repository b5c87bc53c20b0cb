"""An answer, and the forms in which the teacher's knowledge of it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .head import OutputHead
from .sketch import TeacherSketch, sketch_teacher


@dataclass(kw_only=True, eq=False)
class Answer:
    """The answer to one query, and what the teacher knew when it gave each of its tokens."""

    ids: list[int]
    """n token ids, closed by the end-of-sequence token unless the answer was cut short."""

    hidden: Tensor | None = None
    """[n, D] on the CPU, in the model's dtype: row i is the hidden state that predicts ids[i]."""

    sketch: TeacherSketch | None = None
    """Over [n], on the CPU: the distributions that predict ids."""


@dataclass(kw_only=True, frozen=True)
class SketchOptions:
    """What ``sketch_teacher`` is asked for; the rest it gets from the model's head."""

    top_k: int | None = None
    temperature: float = 1.0


def keep_states(answers: Sequence[Answer], states: Sequence[Tensor]) -> None:
    """Give each answer its hidden states [n, D]."""
    hidden = torch.cat(list(states)).cpu()
    for answer, part in zip(answers, hidden.split(_lengths(answers)), strict=True):
        answer.hidden = part


def keep_sketches(
    answers: Sequence[Answer], states: Sequence[Tensor], head: OutputHead, options: SketchOptions
) -> None:
    """Give each answer the sketch of its hidden states [n, D], and let these go."""
    sketch = sketch_teacher(
        torch.cat(list(states)),
        head.weight,
        top_k=options.top_k,
        bias=head.bias,
        logit_scale=head.logit_scale,
        temperature=options.temperature,
    )
    for answer, part in zip(answers, split(sketch.to("cpu"), _lengths(answers)), strict=True):
        answer.sketch = part


def split(sketch: TeacherSketch, lengths: Sequence[int]) -> list[TeacherSketch]:
    """One sketch for each of the answers that have so many tokens."""
    return [sketch[start:stop] for start, stop in pairwise(accumulate(lengths, initial=0))]


def _lengths(answers: Sequence[Answer]) -> list[int]:
    return [len(answer.ids) for answer in answers]
