"""A soft prompt as a prompt-tuning adapter of PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..base_model.decoding import end_ids
from ..data.chat_template import template_facts
from ..data.queries import render_query, student_layout, text_ids, tokenize_query
from ..student.model import SoftPromptModel
from ..student.soft_prompt import PEFT_FILE, WEIGHTS_FILE, SoftPrompt
from ..utils.files import write_bytes, write_json
from .common import QUESTION, dtype_name, embed, readme


@torch.no_grad()
def export_peft(
    model: SoftPromptModel,
    tokenizer: Any,
    directory: Path,
    *,
    at: str,
    base: str,
    max_new_tokens: int,
) -> str:
    """A prompt-tuning adapter: adapter_model.safetensors and adapter_config.json.

    PEFT puts its virtual tokens before everything else. Where a prompt stands in the chat template,
    the opening of the template becomes virtual tokens as well: it is the same for every question.
    """
    prompt = model.prompt
    question = [{"role": "user", "content": QUESTION}]
    query = tokenize_query(tokenizer, question, "")
    before, ids = student_layout(query, prompt.config.placement)
    embedding = torch.cat([embed(model, before).float(), prompt.embedding]).cpu()
    config = replace(prompt.config, num_virtual_tokens=len(embedding))
    adapter = SoftPrompt(embedding, config, {**prompt.base, "name_or_path": base})
    write_bytes(directory / WEIGHTS_FILE, save({"prompt_embeddings": embedding}))
    write_json(directory / PEFT_FILE, adapter.peft_config())
    _, after, plain = render_query(tokenizer, question)
    text = after if prompt.config.placement == "system" else plain
    ends = end_ids(model.base, tokenizer)
    return readme(
        "peft",
        path=at,
        model_name=base,
        dtype=dtype_name(model),
        num_virtual_tokens=prompt.config.num_virtual_tokens,
        num_opening_tokens=len(before),
        # Some tokenizers read a text that begins here otherwise than one that goes on: then only
        # ids are exact.
        text=text if text_ids(tokenizer, text) == ids else None,
        placeholder=QUESTION,
        template=template_facts(tokenizer),
        end_ids=ends or None,
        pad_id=ends[0] if ends else 0,
        max_new_tokens=max_new_tokens,
    )
