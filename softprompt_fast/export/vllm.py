"""A soft prompt as the bodies of requests to vLLM's server."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base_model.decoding import end_ids
from ..base_model.output_head import input_embedding
from ..data.chat_template import DATE, DATE_STRING, KWARGS, server_kwargs, template_facts
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
from ..utils.files import write_json
from .common import QUESTION, dtype_name, embed, readme

SYSTEM_FILE = "system_message.json"


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
) -> str:
    """The bodies of requests to vLLM's server, for each of ``records``.

    completion-N.json holds the embeddings of the whole prompt, template included; chat-N.json the
    virtual tokens alone, as the system message of a chat that the server puts into the template.
    system_message.json is that message. Chats are there where the template allows them. No body
    names a model: vLLM takes the one that it serves, under whatever name.

    Raises ValueError if a query and its answer do not fit into the model's positions, or if there
    is no query and no such message.
    """
    queries = [tokenize_query(tokenizer, r.messages, "", source=r.source) for r in records]
    for query in queries:
        model.check_length(query, max_new_tokens)
    options = {
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "repetition_penalty": 1.0,  # vLLM follows the checkpoint's own where none is given
        "stop_token_ids": end_ids(model.base, tokenizer),
    }
    kwargs = server_kwargs(tokenizer)
    chat_options = {KWARGS: kwargs} if kwargs else {}
    sample = [{"role": "user", "content": QUESTION}]
    system = None
    if _fits_chat(model, tokenizer, sample, tokenize_query(tokenizer, sample, "")):
        part = {"type": "prompt_embeds", "data": _base64(_prompt(model))}
        system = {"role": "system", "content": [part]}
        write_json(directory / SYSTEM_FILE, system)
    elif not records:
        raise ValueError(
            f"a prompt with placement {model.prompt.config.placement} is no message of this chat "
            'template: only whole prompts are left. Give a "QUESTION" or --query_file.'
        )
    digits = len(str(len(records)))
    written, without_chat = [], []
    for number, (record, query) in enumerate(zip(records, queries, strict=True), 1):
        bodies = _bodies(model, tokenizer, record.messages, query, system)
        for api, body in bodies.items():
            written.append(f"{api}-{number:0{digits}}.json")
            own = chat_options if api == "chat" else {}
            write_json(directory / written[-1], {**options, **own, **body})
        if "chat" not in bodies:
            without_chat.append(number)
    return readme(
        "vllm",
        path=at,
        model_name=base,
        dtype=dtype_name(model),
        requests=written[:2] if system else written[:1],
        system_file=SYSTEM_FILE if system else None,
        without_chat=without_chat if system else [],
        chat_options=chat_options,
        date=None if DATE_STRING in kwargs else template_facts(tokenizer).get(DATE),
    )


def _bodies(
    model: SoftPromptModel,
    tokenizer: Any,
    messages: list[dict[str, str]],
    query: Query,
    system: dict[str, Any] | None,
) -> dict[str, dict[str, Any]]:
    """One query as a "completion", and as a "chat" where the message ``system`` can begin it."""
    before, after = student_layout(query, model.prompt.config.placement)
    embeds = torch.cat([embed(model, before), _prompt(model), embed(model, after)])
    bodies: dict[str, dict[str, Any]] = {"completion": {"prompt_embeds": _base64(embeds)}}
    if system is not None and _fits_chat(model, tokenizer, messages, query):
        bodies["chat"] = {"messages": [system, *messages]}
    return bodies


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


def _base64(embeds: Tensor) -> str:
    """``torch.save`` as text."""
    file = io.BytesIO()
    torch.save(embeds.detach().cpu(), file)
    return base64.b64encode(file.getvalue()).decode()
