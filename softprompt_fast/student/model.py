"""The student: a frozen causal language model that sees a soft prompt in the context's place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..base_model.activation_checkpointing import check_checkpointing, set_checkpointing
from ..base_model.checks import (
    check_ids,
    check_model,
    on_one_side,
    position_limit,
    position_switch,
)
from ..base_model.output_head import OutputHead, hidden_states, input_embedding
from ..base_model.virtual_tokens import read_as
from ..data.queries import Query, student_layout
from .collator import IGNORE, Collator, Packing
from .packing import attention_mask as mask_of_segments
from .packing import longest_packed
from .soft_prompt import SoftPrompt


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
        check_model(base)
        self.prompt = prompt.to(input_embedding(base).weight.device)

    @property
    def head(self) -> OutputHead:
        """Read anew each time: moving the model replaces its tensors."""
        return OutputHead.from_model(self.base)

    def train(self, mode: bool = True) -> SoftPromptModel:
        """The base stays in evaluation mode: its dropout would make the student another model."""
        super().train(mode)
        set_checkpointing(self.base, mode)
        return self

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Called by ``transformers.Trainer``. Raises ValueError if the base cannot do it."""
        self.base.activation_checkpointing_enable(**options)
        check_checkpointing(self.base)
        self.train(self.training)

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The same, by the name that earlier versions of transformers call."""
        self.base.gradient_checkpointing_enable(**options)
        check_checkpointing(self.base)
        self.train(self.training)

    def check_length(self, query: Query, answer_tokens: int) -> None:
        """Raises ValueError if prompt, query and answer do not fit into the base's positions, or if
        a token of the query has no embedding."""
        parts = student_layout(query, self.prompt.config.placement)
        check_ids(self.base, chain(*parts), query.source)
        limit = position_limit(self.base)
        P = self.prompt.config.num_virtual_tokens
        asked = sum(map(len, parts))
        if limit is not None and P + asked + answer_tokens > limit:
            raise ValueError(
                f"{query.source or 'a query'}: {P} virtual tokens, the query's {asked} and the "
                f"answer's {answer_tokens} do not fit into the model's {limit} positions. "
                "Lower num_virtual_tokens, or shorten the query or the answer."
            )

    def collator(
        self,
        padding_side: str = "right",
        *,
        packing: bool = False,
        share_prompt: bool = True,
        with_examples: bool = False,
    ) -> Collator:
        """For examples that this model reads.

        packing: examples share rows, and with share_prompt the prompt of a row, as far as the base
        reads them so with equal results; as if False elsewhere.
        with_examples: a batch holds its examples too.
        """
        config = self.prompt.config
        longest = longest_packed(self.base) if packing else 0
        width = self.prompt.embedding.shape[1]
        return Collator(
            num_virtual_tokens=config.num_virtual_tokens,
            placement=config.placement,
            padding_side=padding_side,
            packing=Packing(width=width, longest=longest, share_prompt=share_prompt)
            if longest
            else None,
            with_examples=with_examples,
        )

    def inputs_embeds(
        self, input_ids: Tensor, prompt_mask: Tensor, *, gradient_scale: float = 1.0
    ) -> Tensor:
        """Embeddings [R, L, D] in the base's dtype, with the prompt where ``prompt_mask`` is True.

        prompt_mask [R, L], P positions for each copy of the prompt
        gradient_scale: a factor on the prompt's gradient
        """
        embeds = input_embedding(self.base)(input_ids)
        prompt = scaled(self.prompt.embedding, value=1.0, gradient=gradient_scale)
        # Expanded before it is rounded: the copies' gradients are added up in fp32. Those of the
        # sequences that share a copy meet before, in the base's dtype: in bf16 on SmolLM2-135M the
        # error of the sum is that of plain rows.
        copies = int(prompt_mask.sum()) // len(prompt)
        prompt = prompt.expand(copies, -1, -1).to(embeds.dtype)
        return embeds.masked_scatter(prompt_mask.unsqueeze(-1), prompt)

    def forward(
        self,
        input_ids: Tensor,
        prompt_mask: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        segment_ids: Tensor | None = None,
        gradient_scale: float = 1.0,
    ) -> Tensor:
        """Hidden states [T, D] at the T positions that carry a label, row by row. No logits.

        One of attention_mask and segment_ids, as ``Collator`` makes them.
        """
        if segment_ids is not None:
            attention_mask = mask_of_segments(self.base, segment_ids)
        embeds = self.inputs_embeds(input_ids, prompt_mask, gradient_scale=gradient_scale)
        parts = []
        for rows in self._read_together(position_ids):
            with read_as(self.base, embeds[rows]):
                hidden = hidden_states(
                    self.base,
                    input_ids=input_ids[rows],
                    attention_mask=attention_mask[rows] if attention_mask is not None else None,
                    position_ids=position_ids[rows],
                    use_cache=False,
                )
            parts.append(hidden[labels[rows] != IGNORE])
        return torch.cat(parts)

    def _read_together(self, position_ids: Tensor) -> Iterable[slice]:
        """The rows in their order, all at once unless the base has a ``position_switch``."""
        switch = position_switch(self.base)
        if switch == math.inf:
            return [slice(None)]  # without waiting for the device
        return on_one_side((position_ids.amax(dim=1) + 1).tolist(), switch)


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
