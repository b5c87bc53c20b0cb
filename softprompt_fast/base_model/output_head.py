"""The output head of a causal language model: hidden states [.., D] -> logits [.., V].

The one place that reads these facts from a model and its config. The losses get them by
``OutputHead.loss_options``, so no other file knows how an architecture scales its logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses import reference


@dataclass(kw_only=True, frozen=True)
class OutputHead:
    """``logits = softcap(logit_scale * (hidden @ weight.T + bias))``, all frozen."""

    weight: Tensor
    """[V, D], without gradient; shares the model's storage."""

    bias: Tensor | None = None
    """[V]."""

    softcap: float | None = None
    """``softcap * tanh(z / softcap)``; None: logits are not capped."""

    logit_scale: float = 1.0

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> OutputHead:
        """Read the head of a ``transformers`` causal language model.

        Raises ValueError if the model has no output embeddings.
        """
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings. "
                "Load the model with AutoModelForCausalLM."
            )
        bias = getattr(layer, "bias", None)
        config = model.config.get_text_config(decoder=True)
        return cls(
            weight=layer.weight.detach(),
            bias=None if bias is None else bias.detach(),
            softcap=getattr(config, "final_logit_softcapping", None),
            logit_scale=_logit_scale(config),
        )

    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments that every ``softprompt_fast.linear_*`` takes."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: Tensor) -> Tensor:
        """Materialised fp32 logits [..., V] of ``hidden`` [..., D]; never used in training."""
        return reference.logits(hidden, self.weight, **self.loss_options())


def hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """What the model's own head would be given, [B, L, D]: one decoder call, no logits.

    inputs: what the decoder's forward takes (input_ids or inputs_embeds, attention_mask,
    position_ids, past_key_values, use_cache).
    """
    return decoder(model)(**inputs).last_hidden_state


def decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    body = model.get_decoder()
    # Llama 4 keeps its decoder under another name than its class says, and returns itself.
    return model.model if body is model and hasattr(model, "model") else body


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The layer from token ids to what ``inputs_embeds`` takes; its ``weight`` is [V, D]."""
    return cast(nn.Embedding, model.get_input_embeddings())


def check_ids(model: PreTrainedModel, ids: Iterable[int], source: str) -> None:
    """Raises ValueError if a token has no embedding: one that was added to the tokenizer alone."""
    largest, rows = max(ids, default=0), input_embedding(model).weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"{source or 'a query'}: token {largest} has no embedding, the model has {rows}. Its "
            "tokenizer was given more tokens: resize the model's embeddings, or keep the text and "
            "the chat template free of them."
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read, None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare ``OutputHead`` with the model's own logits on a few tokens.

    Raises ValueError with the numbers if the model does something to its logits that is not
    known here, or if it reads token ids besides their embeddings (a virtual token has no id).
    """
    name = type(model).__name__
    embed = input_embedding(model)
    # From all over the vocabulary: a padding or unused token may be embedded as zero.
    ids = torch.arange(1, 9, device=model.device)[None] * len(embed.weight) // 9
    hidden = hidden_states(model, inputs_embeds=embed(ids), use_cache=False)
    _require_equal(
        f"the hidden states of {name} from embeddings (first) and from token ids",
        hidden,
        hidden_states(model, input_ids=ids, use_cache=False),
        model.dtype,
        "The model reads token ids besides their embeddings: soft prompts cannot replace them.",
    )
    _require_equal(
        f"the logits of {name} by OutputHead (first) and by the model",
        OutputHead.from_model(model).logits(hidden),
        model(input_ids=ids, use_cache=False).logits,
        model.dtype,
        "The model transforms its logits in a way that OutputHead does not know.",
    )


def _logit_scale(config: Any) -> float:
    """The product of what the architectures multiply or divide their logits by."""
    scale = 1.0
    # Cohere; Falcon-H1; Muse.
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= _number(config, name)
    # Granite.
    scale /= _number(config, "logits_scaling")
    return scale


def _number(config: Any, name: str) -> float:
    value = getattr(config, name, None)
    return 1.0 if value is None else float(value)


def _require_equal(
    what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype, meaning: str
) -> None:
    # A logit is rounded in the model's dtype once for each operation after the product, whatever
    # dtype it is returned in.
    relative = max(1e-4, 4 * torch.finfo(dtype).eps)
    ours, theirs = ours.float(), theirs.float()
    difference = (ours - theirs).abs()
    if difference.max() <= relative * theirs.abs().max().clamp(min=1e-3):
        return
    worst = int(difference.argmax())
    raise ValueError(
        f"{what} differ at entry {worst}: {ours.flatten()[worst]:.6g} and "
        f"{theirs.flatten()[worst]:.6g}. {meaning}"
    )
