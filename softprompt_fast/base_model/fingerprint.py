"""What tells one base model from another, in whatever dtype it is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.chat_template import template_facts
from .fsdp import whole
from .output_head import input_embedding, is_plain

# A fine-tuned model differs in all matrices, or in every nth: one number of each of these many.
SAMPLES = 128
# Rounding to bf16 moves a number by 2^-8 of itself at most, to fp16 by 2^-24 near zero.
RELATIVE, ABSOLUTE = 2.0**-6, 2.0**-22


def base_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Sizes by name, and ``weights``: by a matrix's name, the number in its middle."""
    settle(model)
    config = model.config.get_text_config(decoder=True)
    vocabulary, width = input_embedding(model).weight.shape
    method = quantization(model.config)
    matrices = list(_matrices(model))
    sampled = matrices[:: max(1, len(matrices) // SAMPLES)]
    return {
        "name_or_path": model.config._name_or_path,
        "model_type": config.model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": config.num_hidden_layers,
        # recurrent models have none
        "num_attention_heads": getattr(config, "num_attention_heads", None),
        **({} if method is None else {"quantization": method}),
        "weights": {name: middle() for name, middle in sampled},
    }


@torch.no_grad()
def settle(model: PreTrainedModel) -> None:
    """One call of the whole model, since the first one may rewrite what it holds.

    compressed-tensors unpacks, RWKV scales its layers. Raises ValueError if bitsandbytes has packed
    the model for inference, which has no gradients: it would do so now, and is told not to.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name}: bitsandbytes has packed its 4 bits for inference, since the model was "
                "used before. Load it anew, and hand it over before its first call."
            )
    was_training = model.training
    token = torch.zeros(1, 1, dtype=torch.long, device=input_embedding(model).weight.device)
    model.eval()(input_ids=token)
    model.train(was_training)


def quantization(config: Any) -> str | None:
    """By what the weights of a model were quantised, None where they were not."""
    config = getattr(config, "quantization_config", None)
    if config is None:
        return None
    method = config["quant_method"] if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method))


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, Callable[[], float]]]:
    """Each matrix by its name, and what gives the number in its middle."""
    seen = set[Tensor]()
    for prefix, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if p not in seen}
        seen.update(own.values())
        plain = [name for name, value in own.items() if value.dim() > 1 and is_plain(value)]
        for name in plain:
            yield f"{prefix}.{name}".lstrip("."), partial(_middle, module, name)
        if not plain and _is_linear(module):
            yield f"{prefix}.weight", partial(_middle_of_quantised, module, model.dtype)


def _is_linear(module: nn.Module) -> bool:
    is_leaf = next(module.children(), None) is None
    holds = next(chain(module.parameters(), module.buffers()), None) is not None
    return is_leaf and hasattr(module, "in_features") and holds


@torch.no_grad()
def _middle(module: nn.Module, name: str) -> float:
    with align_module_device(module):
        value = whole(getattr(module, name))
        return float(value.flatten()[value.numel() // 2])


@torch.no_grad()
def _middle_of_quantised(module: Any, dtype: torch.dtype) -> float:
    """By what the layer makes of a unit vector: how it keeps its numbers is its own business."""
    held = next(chain(module.parameters(), module.buffers()))
    unit = torch.zeros(1, module.in_features, dtype=dtype, device=held.device)
    unit[0, module.in_features // 2] = 1
    made = module(unit)[0]
    return float(made[len(made) // 2])


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
        f"{name}: prompt {prompt.get(name)!r}, model {model.get(name)!r}"
        for name in dict.fromkeys((*model, "quantization"))
        if name not in ("name_or_path", "weights") and prompt.get(name) != model.get(name)
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
