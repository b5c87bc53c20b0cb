"""From training examples to the tensors of one batch, plain or packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.queries import student_layout
from ..losses.sketch import TeacherSketch
from ..teacher.examples import TrainingExample
from .packing import PADDING, SHARED, pack

IGNORE = -100

# What a batch holds for each token, and what it holds where there is none.
FILL = {
    "input_ids": 0,
    "prompt_mask": False,
    "segment_ids": PADDING,
    "position_ids": 0,
    "labels": IGNORE,
}
Row = dict[str, Tensor]


@dataclass(kw_only=True, frozen=True)
class Packing:
    """How sequences share rows, see ``packing``."""

    width: int
    """D of the model."""

    longest: float
    """A batch with a longer sequence than this, prompt included, is not packed."""

    share_prompt: bool = True
    """Once in each row, instead of once in each sequence."""


@dataclass(kw_only=True, frozen=True)
class Collator:
    """Training examples -> one batch for ``SoftPromptModel``."""

    num_virtual_tokens: int
    placement: str
    padding_side: str = "right"
    packing: Packing | None = None
    """None: a row for each example."""

    with_examples: bool = False

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be left or right: got {self.padding_side!r}.")

    def __call__(self, examples: Sequence[TrainingExample]) -> dict[str, Any]:
        """input_ids, prompt_mask, position_ids, labels, and attention_mask or, where they are
        packed, segment_ids: [R, L]; teacher_hidden: [T, D], in the order of the labels, if it was
        recorded; teacher_sketch: over [T], likewise; sources: the examples' names; examples:
        themselves, in the order of the labels, if they are asked for.

        labels hold the answer's token ids at the positions that predict them, -100 elsewhere.
        """
        packing = self.packing if self._may_be_packed(examples) else None
        rows = [[e] for e in examples] if packing is None else self._packed(examples, packing)
        # From here on in the order of the labels.
        examples = [example for row in rows for example in row]
        share_prompt = packing is not None and packing.share_prompt
        tokens = [self._row(row, share_prompt) for row in rows]
        batch: dict[str, Any] = {
            name: self._pad([row[name] for row in tokens], fill) for name, fill in FILL.items()
        }
        if packing is None:
            batch["attention_mask"] = (batch.pop("segment_ids") != PADDING).long()
        hidden = [e.answer.hidden for e in examples if e.answer.hidden is not None]
        if len(hidden) == len(examples):
            batch["teacher_hidden"] = torch.cat(hidden)
        sketches = [e.answer.sketch for e in examples if e.answer.sketch is not None]
        if len(sketches) == len(examples):
            batch["teacher_sketch"] = TeacherSketch.cat(sketches)
        if self.with_examples:
            batch["examples"] = list(examples)
        batch["sources"] = [example.query.source for example in examples]
        return batch

    def _may_be_packed(self, examples: Sequence[TrainingExample]) -> bool:
        if self.packing is None:
            return False
        longest = max(len(self._opening_ids(e)) + len(self._rest_ids(e)) for e in examples)
        return longest <= self.packing.longest

    def _packed(
        self, examples: Sequence[TrainingExample], packing: Packing
    ) -> list[list[TrainingExample]]:
        """The examples of each row; those that share a prompt open alike."""

        def opening(example: TrainingExample) -> tuple[int, ...]:
            return tuple(self._opening_ids(example)) if packing.share_prompt else ()

        def own_length(example: TrainingExample) -> int:
            whole = len(self._opening_ids(example)) + len(self._rest_ids(example))
            return whole - len(opening(example))

        groups: dict[tuple[int, ...], list[TrainingExample]] = defaultdict(list)
        for example in examples:
            groups[opening(example)].append(example)
        return [
            [group[index] for index in row]
            for shared, group in groups.items()
            for row in pack(list(map(own_length, group)), len(shared), packing.width)
        ]

    def _row(self, examples: Sequence[TrainingExample], share_prompt: bool) -> dict[str, Tensor]:
        pieces = []
        for segment, example in enumerate(examples, SHARED + 1):
            if not share_prompt:
                pieces.append(self._opening(example, segment))
            elif not pieces:
                pieces.append(self._opening(example, SHARED))
            pieces.append(self._rest(example, segment))
        return {name: torch.cat([piece[name] for piece in pieces]) for name in FILL}

    def _opening(self, example: TrainingExample, segment: int) -> dict[str, Tensor]:
        """What comes before the query's own tokens: the prompt is its end."""
        ids = self._opening_ids(example)
        is_prompt = torch.arange(len(ids)) >= len(ids) - self.num_virtual_tokens
        return {
            "input_ids": torch.tensor(ids),
            "prompt_mask": is_prompt,
            "segment_ids": torch.full((len(ids),), segment),
            "position_ids": torch.arange(len(ids)),
            "labels": torch.full((len(ids),), IGNORE),
        }

    def _rest(self, example: TrainingExample, segment: int) -> dict[str, Tensor]:
        """The query's own tokens, and those of the answer."""
        ids, answer = self._rest_ids(example), example.answer.ids
        start = len(self._opening_ids(example))
        labels = torch.full((len(ids),), IGNORE)
        labels[len(ids) - len(answer) :] = torch.tensor(answer)
        return {
            "input_ids": torch.tensor(ids),
            "prompt_mask": torch.zeros(len(ids), dtype=torch.bool),
            "segment_ids": torch.full((len(ids),), segment),
            "position_ids": torch.arange(start, start + len(ids)),
            "labels": labels,
        }

    def _opening_ids(self, example: TrainingExample) -> list[int]:
        before, _ = student_layout(example.query, self.placement)
        return before + [0] * self.num_virtual_tokens

    def _rest_ids(self, example: TrainingExample) -> list[int]:
        _, after = student_layout(example.query, self.placement)
        # The last token of the answer predicts nothing that is asked for.
        return after + example.answer.ids[:-1]

    def _pad(self, rows: list[Tensor], fill: int | bool) -> Tensor:
        return nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=fill, padding_side=self.padding_side
        )
