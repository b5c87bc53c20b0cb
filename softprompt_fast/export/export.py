"""A soft prompt in the forms that other programs read: PEFT, vLLM, plain safetensors.

Each function fills a directory and returns how what lies there is read. Of two arguments that they
share, ``at`` is the path where the directory will be found, ``base`` the name of the model there.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..base_model.decoding import end_ids
from ..base_model.output_head import input_embedding
from ..data.queries import (
    Query,
    render_query,
    slot_is_system_message,
    student_layout,
    text_ids,
    tokenize_query,
)
from ..data.records import Record
from ..student.model import SoftPromptModel
from ..student.soft_prompt import PEFT_FILE, WEIGHTS_FILE, SoftPrompt
from ..utils.files import write_bytes, write_json
from .usage import QUESTION, Usage, usage_in_peft, usage_in_vllm, usage_of_safetensors

SAFETENSORS_FILE = "soft_prompt.safetensors"
SYSTEM_FILE = "system_message.json"


def export_safetensors(prompt: SoftPrompt, directory: Path, *, at: str, base: str) -> Usage:
    """``prompt_embeddings`` [P, D] in fp32, and facts as metadata: names and values are text."""
    facts = {
        "format": "pt",
        "placement": prompt.config.placement,
        "num_virtual_tokens": prompt.config.num_virtual_tokens,
        "base_model_name_or_path": base,
        **{n: v for n, v in prompt.base.items() if n not in ("weights", "name_or_path")},
    }
    metadata = {name: str(value) for name, value in facts.items()}
    embedding = prompt.embedding.detach().cpu().contiguous()
    write_bytes(directory / SAFETENSORS_FILE, save({"prompt_embeddings": embedding}, metadata))
    return usage_of_safetensors(f"{at}/{SAFETENSORS_FILE}", prompt.config.placement)


@torch.no_grad()
def export_peft(
    model: SoftPromptModel,
    tokenizer: Any,
    directory: Path,
    *,
    at: str,
    base: str,
    max_new_tokens: int,
) -> Usage:
    """A prompt-tuning adapter: adapter_model.safetensors and adapter_config.json.

    PEFT puts its virtual tokens before everything else. Where a prompt stands in the chat template,
    the opening of the template becomes virtual tokens as well: it is the same for every question.
    """
    prompt = model.prompt
    question = [{"role": "user", "content": QUESTION}]
    query = tokenize_query(tokenizer, question, "")
    before, ids = student_layout(query, prompt.config.placement)
    embedding = torch.cat([_embed(model, before).float(), prompt.embedding]).cpu()
    config = replace(prompt.config, num_virtual_tokens=len(embedding))
    adapter = SoftPrompt(embedding, config, {**prompt.base, "name_or_path": base})
    write_bytes(directory / WEIGHTS_FILE, save({"prompt_embeddings": embedding}))
    write_json(directory / PEFT_FILE, adapter.peft_config())
    _, after, plain = render_query(tokenizer, question)
    text = after if prompt.config.placement == "system" else plain
    return usage_in_peft(
        at,
        base,
        dtype=_dtype(model),
        num_virtual_tokens=prompt.config.num_virtual_tokens,
        num_opening_tokens=len(before),
        # Some tokenizers read a text that begins here otherwise than one that goes on.
        text=text if text_ids(tokenizer, text) == ids else None,
        end_ids=end_ids(model.base, tokenizer),
        max_new_tokens=max_new_tokens,
    )


@torch.no_grad()
def export_vllm(
    model: SoftPromptModel,
    tokenizer: Any,
    records: Sequence[Record],
    directory: Path,
    *,
    at: str,
    base: str,
    max_new_tokens: int,
) -> Usage:
    """The bodies of requests to vLLM's server, for each of ``records``.

    completion-N.json holds the embeddings of the whole prompt, template included; chat-N.json the
    virtual tokens alone, as the system message of a chat that the server puts into the template.
    system_message.json is that message. Chats are there where the template allows them.

    Raises ValueError if a query and its answer do not fit into the model's positions, or if there
    is no query and no such message.
    """
    queries = [tokenize_query(tokenizer, r.messages, "", source=r.source) for r in records]
    for query in queries:
        model.check_length(query, max_new_tokens)
    options = {
        "model": base,
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "repetition_penalty": 1.0,  # vLLM follows the checkpoint's own where none is given
        "stop_token_ids": end_ids(model.base, tokenizer),
    }
    sample = [{"role": "user", "content": QUESTION}]
    has_system = _fits_chat(model, tokenizer, sample, tokenize_query(tokenizer, sample, ""))
    part = {"type": "prompt_embeds", "data": _base64(_prompt(model))}
    system = {"role": "system", "content": [part]}
    if not has_system and not records:
        raise ValueError(
            f"a prompt with placement {model.prompt.config.placement} is no message of this chat "
            'template: only whole prompts are left. Give a "QUESTION" or --query_file.'
        )
    if has_system:
        write_json(directory / SYSTEM_FILE, system)
    written, without_chat = [], []
    for number, (record, query) in enumerate(zip(records, queries, strict=True), 1):
        name = f"{number:0{len(str(len(records)))}}.json"
        before, after = student_layout(query, model.prompt.config.placement)
        embeds = torch.cat([_embed(model, before), _prompt(model), _embed(model, after)])
        bodies: dict[str, Any] = {f"completion-{name}": {"prompt_embeds": _base64(embeds)}}
        if has_system and _fits_chat(model, tokenizer, record.messages, query):
            bodies[f"chat-{name}"] = {"messages": [system, *record.messages]}
        else:
            without_chat.append(number)
        for file, body in bodies.items():
            write_json(directory / file, {**options, **body})
            written.append(file)
    return usage_in_vllm(
        at,
        base,
        dtype=_dtype(model),
        requests=written[:2] if has_system else written[:1],
        system_file=SYSTEM_FILE if has_system else None,
        without_chat=without_chat if has_system else [],
    )


def _fits_chat(
    model: SoftPromptModel, tokenizer: Any, messages: list[dict[str, str]], query: Query
) -> bool:
    """Whether a server that renders the system message reads the ids that we read."""
    if model.prompt.config.placement != "system":
        return False
    if not slot_is_system_message(tokenizer, messages):
        return False
    before, after, _ = render_query(tokenizer, messages)
    return (query.before, query.after) == (text_ids(tokenizer, before), text_ids(tokenizer, after))


def _prompt(model: SoftPromptModel) -> Tensor:
    """[P, D], in the dtype of the base."""
    return model.prompt.embedding.to(input_embedding(model.base).weight.dtype)


def _embed(model: SoftPromptModel, ids: list[int]) -> Tensor:
    """[len(ids), D], in the dtype of the base."""
    device = model.prompt.embedding.device
    return input_embedding(model.base)(torch.tensor(ids, dtype=torch.long, device=device))


def _base64(embeds: Tensor) -> str:
    """``torch.save`` as text."""
    file = io.BytesIO()
    torch.save(embeds.detach().cpu(), file)
    return base64.b64encode(file.getvalue()).decode()


def _dtype(model: SoftPromptModel) -> str:
    return str(model.base.dtype).removeprefix("torch.")
