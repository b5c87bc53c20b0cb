"""The student: a frozen causal language model that sees a soft prompt in the context's place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .head import OutputHead, check_head, hidden_states, input_embedding, position_limit
from .prompting import Query, student_layout
from .sketch import TeacherSketch
from .soft_prompt import SoftPrompt
from .teacher import Answer

IGNORE = -100


@dataclass(kw_only=True, eq=False)
class TrainingExample:
    """A query and the answer that the student has to learn."""

    query: Query
    answer: Answer

    def __post_init__(self) -> None:
        answer = self.answer
        known = {"hidden states": answer.hidden}
        known["sketches"] = None if answer.sketch is None else answer.sketch.tail
        for name, values in known.items():
            if not answer.ids or (values is not None and len(values) != len(answer.ids)):
                raise ValueError(
                    f"{self.query.source or 'query'}: an answer needs at least one token, and what "
                    f"is known of the teacher for each: got {len(answer.ids)} tokens and "
                    f"{'no' if values is None else len(values)} {name}."
                )


class SoftPromptModel(nn.Module):
    """A frozen ``base`` and a trainable ``prompt``. Only the prompt has gradients or is saved."""

    # transformers.Trainer: the loss is divided by the number of labels of the whole step.
    accepts_loss_kwargs = True

    def __init__(self, base: PreTrainedModel, prompt: SoftPrompt) -> None:
        """Freezes ``base``. Raises ValueError if ``prompt`` belongs to another model, or if the
        model's logits are not what ``OutputHead`` makes of its hidden states."""
        super().__init__()
        prompt.check_base(base)
        self.base = base.requires_grad_(False).eval()
        check_head(base)
        self.prompt = prompt.to(input_embedding(base).weight.device)

    @property
    def head(self) -> OutputHead:
        """Read anew each time: moving the model replaces its tensors."""
        return OutputHead.from_model(self.base)

    def train(self, mode: bool = True) -> SoftPromptModel:
        """The base stays in evaluation mode: its dropout would make the student another model."""
        super().train(mode)
        self.base.eval()
        return self

    def check_length(self, query: Query, answer_tokens: int) -> None:
        """Raises ValueError if prompt, query and answer do not fit into the base's positions."""
        limit = position_limit(self.base)
        P = self.prompt.config.num_virtual_tokens
        asked = sum(map(len, student_layout(query, self.prompt.config.placement)))
        if limit is not None and P + asked + answer_tokens > limit:
            raise ValueError(
                f"{query.source or 'a query'}: {P} virtual tokens, the query's {asked} and the "
                f"answer's {answer_tokens} do not fit into the model's {limit} positions. "
                "Lower num_virtual_tokens, or shorten the query or the answer."
            )

    def collator(self, padding_side: str = "right", *, with_examples: bool = False) -> Collator:
        """For examples that this model reads."""
        config = self.prompt.config
        return Collator(
            num_virtual_tokens=config.num_virtual_tokens,
            placement=config.placement,
            padding_side=padding_side,
            with_examples=with_examples,
        )

    def inputs_embeds(
        self, input_ids: Tensor, prompt_mask: Tensor, *, gradient_scale: float = 1.0
    ) -> Tensor:
        """Embeddings [B, L, D] in the base's dtype, with the prompt where ``prompt_mask`` is True.

        prompt_mask: [B, L], P positions in each row. gradient_scale: of the prompt's gradient.
        """
        embeds = input_embedding(self.base)(input_ids)
        prompt = scaled(self.prompt.embedding, value=1.0, gradient=gradient_scale)
        # Expanded before it is rounded: the rows' gradients are added up in fp32.
        prompt = prompt.expand(len(input_ids), -1, -1).to(embeds.dtype)
        return embeds.masked_scatter(prompt_mask.unsqueeze(-1), prompt)

    def forward(
        self,
        input_ids: Tensor,
        prompt_mask: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        gradient_scale: float = 1.0,
    ) -> Tensor:
        """Hidden states [T, D] at the T positions that carry a label, row by row. No logits."""
        hidden = hidden_states(
            self.base,
            inputs_embeds=self.inputs_embeds(input_ids, prompt_mask, gradient_scale=gradient_scale),
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        )
        return hidden[labels != IGNORE]


def scaled(tensor: Tensor, *, value: float, gradient: float) -> Tensor:
    """``tensor * value``, through which a gradient passes as ``grad * gradient``."""
    return _Scaled.apply(tensor, value, gradient)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: float, gradient: float) -> Tensor:
        ctx.gradient = gradient
        return tensor * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.gradient, None, None


@dataclass(kw_only=True, frozen=True)
class Collator:
    """Training examples -> one padded batch for ``SoftPromptModel``."""

    num_virtual_tokens: int
    placement: str
    padding_side: str = "right"
    with_examples: bool = False

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be left or right: got {self.padding_side!r}.")

    def __call__(self, examples: Sequence[TrainingExample]) -> dict[str, Any]:
        """input_ids, prompt_mask, attention_mask, position_ids, labels: [B, L];
        teacher_hidden: [T, D], in the order of the labels, if it was recorded; teacher_sketch: over
        [T], likewise; sources: B names; examples: themselves, if asked for.

        labels hold the answer's token ids at the positions that predict them, -100 elsewhere.
        """
        rows = [self._row(example) for example in examples]
        batch: dict[str, Any] = {
            name: self._pad([row[name] for row in rows], fill)
            for name, fill in (
                ("input_ids", 0),
                ("prompt_mask", False),
                ("attention_mask", 0),
                ("position_ids", 0),
                ("labels", IGNORE),
            )
        }
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

    def _row(self, example: TrainingExample) -> dict[str, Tensor]:
        before, after = student_layout(example.query, self.placement)
        answer = example.answer.ids
        P = self.num_virtual_tokens
        # The last token of the answer predicts nothing that is asked for.
        ids = before + [0] * P + after + answer[:-1]
        length = len(ids)
        labels = torch.full((length,), IGNORE)
        labels[length - len(answer) :] = torch.tensor(answer)
        prompt_mask = torch.zeros(length, dtype=torch.bool)
        prompt_mask[len(before) : len(before) + P] = True
        return {
            "input_ids": torch.tensor(ids),
            "prompt_mask": prompt_mask,
            "attention_mask": torch.ones(length, dtype=torch.long),
            "position_ids": torch.arange(length),
            "labels": labels,
        }

    def _pad(self, rows: list[Tensor], fill: int | bool) -> Tensor:
        return nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=fill, padding_side=self.padding_side
        )
