"""An answer, and the forms in which the teacher's knowledge of it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..base_model.output_head import OutputHead
from ..losses.sketch import TeacherSketch, sketch_teacher

# Before the names of a sketch's tensors.
SKETCH = "sketch."


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


def pack(answers: Sequence[Answer]) -> dict[str, Tensor]:
    """All that they hold, in one tensor of each kind."""
    tensors = {
        "answer_ids": torch.tensor([i for a in answers for i in a.ids], dtype=torch.int32),
        "lengths": torch.tensor(_lengths(answers), dtype=torch.int32),
    }
    hidden = [a.hidden for a in answers if a.hidden is not None]
    if hidden:
        tensors["hidden"] = torch.cat(hidden)
    sketches = [a.sketch for a in answers if a.sketch is not None]
    if sketches:
        joined = TeacherSketch.cat(sketches)
        values = {field.name: getattr(joined, field.name) for field in fields(joined)}
        tensors |= {SKETCH + n: v for n, v in values.items() if isinstance(v, Tensor)}
    return tensors


def unpack(tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> list[Answer]:
    """What was packed. facts: logit_scale and temperature, if there are sketches."""
    lengths = tensors["lengths"].tolist()
    answers = [Answer(ids=part.tolist()) for part in tensors["answer_ids"].split(lengths)]
    if "hidden" in tensors:
        for answer, hidden in zip(answers, tensors["hidden"].split(lengths), strict=True):
            answer.hidden = hidden
    values: Any = {n.removeprefix(SKETCH): t for n, t in tensors.items() if n.startswith(SKETCH)}
    if values:
        options = {name: facts[name] for name in ("logit_scale", "temperature")}
        for answer, own in zip(
            answers, split(TeacherSketch(**values, **options), lengths), strict=True
        ):
            answer.sketch = own
    return answers


def _lengths(answers: Sequence[Answer]) -> list[int]:
    return [len(answer.ids) for answer in answers]
