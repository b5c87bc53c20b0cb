"""What tells one base model from another, in whatever dtype it is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from transformers import PreTrainedModel

from ..data.chat_template import template_facts
from .fsdp import whole
from .output_head import input_embedding

# A fine-tuned model differs in all matrices, or in every nth: one number of each of these many.
SAMPLES = 128
# Rounding to bf16 moves a number by 2^-8 of itself at most, to fp16 by 2^-24 near zero.
RELATIVE, ABSOLUTE = 2.0**-6, 2.0**-22


def base_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Sizes by name, and ``weights``: by a matrix's name, the number in its middle."""
    config = model.config.get_text_config(decoder=True)
    vocabulary, width = input_embedding(model).weight.shape
    matrices = [(name, value) for name, value in model.named_parameters() if value.dim() > 1]
    sampled = matrices[:: max(1, len(matrices) // SAMPLES)]
    return {
        "name_or_path": model.config._name_or_path,
        "model_type": config.model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "weights": {
            name: float(whole(value).detach().flatten()[value.numel() // 2])
            for name, value in sampled
        },
    }


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Digests of what makes token ids of a text, and the text of a chat; what a template reads."""
    return {
        "tokenizer": _tokenizer_sha256(tokenizer),
        "chat_template": sha256_of_json(getattr(tokenizer, "chat_template", None)),
        **template_facts(tokenizer),
    }


def _tokenizer_sha256(tokenizer: Any) -> str:
    if not hasattr(tokenizer, "backend_tokenizer"):
        return sha256_of_json([type(tokenizer).__name__, tokenizer.get_vocab()])
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    # How the last call of the tokenizer cut and padded.
    core["truncation"] = core["padding"] = None
    return sha256_of_json(core)


def sha256_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def differences(prompt: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Where two models' facts differ, but for where the model was loaded from."""
    found = [
        f"{name}: prompt {prompt.get(name)!r}, model {model[name]!r}"
        for name in model
        if name not in ("name_or_path", "weights") and prompt.get(name) != model[name]
    ]
    theirs, ours = prompt.get("weights", {}), model["weights"]
    moved = [
        name
        for name in ours
        if not math.isclose(
            ours[name], theirs.get(name, math.nan), rel_tol=RELATIVE, abs_tol=ABSOLUTE
        )
    ]
    if moved:
        found.append(
            f"weights: {len(moved)} of {len(ours)} compared, {moved[0]} first: "
            f"prompt {theirs.get(moved[0])}, model {ours[moved[0]]}"
        )
    return found
