"""A soft prompt as one plain safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save

from ..student.soft_prompt import SoftPrompt
from ..utils.files import write_bytes
from .common import readme

SAFETENSORS_FILE = "soft_prompt.safetensors"


def export_safetensors(prompt: SoftPrompt, directory: Path, *, at: str, base: str) -> str:
    """``prompt_embeddings`` [P, D] in fp32, and facts as metadata: names and values are text."""
    facts = {
        "format": "pt",
        "placement": prompt.config.placement,
        "num_virtual_tokens": prompt.config.num_virtual_tokens,
        "base_model_name_or_path": base,
        **{n: v for n, v in prompt.base.items() if n not in ("weights", "name_or_path")},
    }
    metadata = {n: v if isinstance(v, str) else json.dumps(v) for n, v in facts.items()}
    embedding = prompt.embedding.detach().cpu().contiguous()
    write_bytes(directory / SAFETENSORS_FILE, save({"prompt_embeddings": embedding}, metadata))
    return readme("safetensors", path=f"{at}/{SAFETENSORS_FILE}", placement=prompt.config.placement)
