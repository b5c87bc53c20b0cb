"""The output head of a causal language model: hidden states [.., D] -> logits [.., V].

The one place that reads these facts from a model and its config. The losses get them by
``OutputHead.loss_options``, so no other file knows how an architecture scales its logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

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

        Raises ValueError if the model has no output embeddings, or if they are not a matrix of
        numbers in memory.
        """
        layer = model.get_output_embeddings()
        if layer is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings. "
                "Load the model with AutoModelForCausalLM."
            )
        weight = _in_memory(model, "output head", layer.weight)
        if not is_plain(weight):
            raise ValueError(
                f"the output head of {type(model).__name__} is quantised ({weight.dtype}, "
                f"{type(weight).__name__}), and the losses read its numbers. Quantise the model "
                "without its head (lm_head), which is the default of transformers."
            )
        bias = getattr(layer, "bias", None)
        config = model.config.get_text_config(decoder=True)
        return cls(
            weight=weight.detach(),
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
    # Llama 4 keeps its decoder under another name than its class says, and returns itself;
    # ModernBERT's decoder calls its head "decoder".
    is_lost = body is model or body is model.get_output_embeddings()
    return model.model if is_lost and hasattr(model, "model") else body


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The layer from token ids to what ``inputs_embeds`` takes; its ``weight`` is [V, D]."""
    layer = cast(nn.Embedding, model.get_input_embeddings())
    _in_memory(model, "input embedding", layer.weight)
    return layer


def _in_memory(model: PreTrainedModel, what: str, weight: Tensor) -> Tensor:
    if weight.is_meta:
        raise ValueError(
            f"the {what} of {type(model).__name__} is offloaded. Load the model with it on the "
            "device; layers may be offloaded."
        )
    return weight


def is_plain(value: Tensor) -> bool:
    """Whether the numbers lie in memory as they are, here or in parts over the processes."""
    is_part = hasattr(value, "full_tensor")
    return value.is_floating_point() and (is_part or type(value) in (nn.Parameter, Tensor))


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
