"""Answers of a model that reads a soft prompt in the place of its context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.generation.streamers import BaseStreamer

from ..base_model.checks import position_switch
from ..base_model.decoding import in_batches, write
from ..base_model.prefix_cache import Prefix
from ..data.queries import Query, student_layout
from ..teacher.answers import Answer
from ..teacher.examples import TrainingExample
from ..teacher.reading import SharedReader
from ..teacher.teacher import Teacher
from ..utils.text import INCOMPLETE, answer_text
from .model import SoftPromptModel


def generate(
    model: SoftPromptModel,
    tokenizer: Any,
    queries: Sequence[Query],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    show_progress: bool = True,
) -> list[str]:
    """The greedy answer to each query, as text. The queries' contexts are not read.

    Raises ValueError if max_new_tokens or batch_size is less than 1, or if the prompt, a query and
    its answer do not fit into the model's positions.
    """
    for query in queries:
        model.check_length(query, max_new_tokens)
    rules = _rules(model, tokenizer, max_new_tokens, batch_size)
    with tqdm(total=len(queries), desc="answers", disable=not show_progress) as progress:
        written = _write_in_rows(model, queries, rules, progress.update)
        if written is None:
            written = _write_in_batches(model, queries, rules, progress.update)
    return [answer_text(tokenizer, ids) for ids in written]


def stream(
    model: SoftPromptModel,
    tokenizer: Any,
    query: Query,
    show: Callable[[str], None],
    *,
    max_new_tokens: int = 64,
) -> str:
    """The answer that ``generate`` gives to one query; ``show`` gets it in pieces, as they come.

    A piece ends where no later token changes it: never inside a character. Raises as ``generate``.
    """
    model.check_length(query, max_new_tokens)
    rules = _rules(model, tokenizer, max_new_tokens, batch_size=1)
    (written,) = _write(model, [query], rules, streamer=Pieces(tokenizer, show))
    return answer_text(tokenizer, written)


class Pieces(BaseStreamer):
    """The text of an answer, without the white space around it.

    Not ``transformers.TextStreamer``, which waits for a space: many scripts have none.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.show = show
        self.ids: list[int] | None = None
        self.shown = ""

    def put(self, value: Tensor) -> None:
        if self.ids is None:  # what comes first is the query
            self.ids = []
            return
        self.ids += value.tolist()
        text = self._text()
        if not text.endswith(INCOMPLETE):
            self._show(text)

    def end(self) -> None:
        self._show(self._text())

    def _text(self) -> str:
        return answer_text(self.tokenizer, self.ids or [])

    def _show(self, text: str) -> None:
        # Bytes that follow a character may show that it was none. What is shown cannot be taken
        # back; what comes after it is shown all the same.
        if len(text) > len(self.shown):
            self.show(text[len(self.shown) :])
            self.shown = text


def _rules(model: SoftPromptModel, tokenizer: Any, max_new_tokens: int, batch_size: int) -> Teacher:
    """The teacher's: which numbers are allowed, which tokens end an answer, who shares a prefix."""
    return Teacher(
        model.base,
        tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        show_progress=False,
    )


@torch.no_grad()
def _write_in_rows(
    model: SoftPromptModel,
    queries: Sequence[Query],
    rules: Teacher,
    on_written: Callable[[], Any],
) -> list[list[int]] | None:
    """The token ids of the answers, in rows that share one copy of the prompt.

    None where the model does not share it.
    """
    config = model.prompt.config
    layouts = [student_layout(query, config.placement) for query in queries]
    written: dict[int, list[int]] = {}
    for before in dict.fromkeys(tuple(before) for before, _ in layouts):
        group = [index for index, (own, _) in enumerate(layouts) if tuple(own) == before]
        asked = [layouts[index][1] for index in group]
        ids = [*before, *[0] * config.num_virtual_tokens]
        tensor = torch.tensor([ids], device=model.prompt.embedding.device)
        is_prompt = torch.arange(len(ids), device=tensor.device)[None] >= len(before)
        prefix = Prefix.read(model.base, ids, embeds=model.inputs_embeds(tensor, is_prompt))
        longest = prefix.length + max(map(len, asked)) + rules.max_new_tokens
        reader = rules.reader(prefix, longest)
        if not isinstance(reader, SharedReader):
            return None
        answers = reader.write(
            asked,
            max_new_tokens=rules.max_new_tokens,
            end_ids=rules.end_ids,
            on_written=on_written,
        )
        written |= zip(group, (answer.ids for answer in answers), strict=True)
    return [written[index] for index in range(len(queries))]


def _write_in_batches(
    model: SoftPromptModel,
    queries: Sequence[Query],
    rules: Teacher,
    on_written: Callable[[], Any],
) -> list[list[int]]:
    """The same in rows each of which is complete."""
    config = model.prompt.config

    def length(index: int) -> int:
        own = student_layout(queries[index], config.placement)
        return config.num_virtual_tokens + sum(map(len, own))

    written: dict[int, list[int]] = {}
    for part in in_batches(
        range(len(queries)),
        rules.batch_size,
        length=length,
        may_pad=Prefix.read(model.base, []).bears_padding,
        switch=position_switch(model.base),
        more=rules.max_new_tokens,
    ):
        written |= zip(part, _write(model, [queries[i] for i in part], rules), strict=True)
        for _ in part:
            on_written()
    return [written[index] for index in range(len(queries))]


@torch.no_grad()
def _write(
    model: SoftPromptModel, queries: Sequence[Query], rules: Teacher, streamer: Any = None
) -> list[list[int]]:
    """The token ids of the answers, read and written as one batch."""
    # The last token of an answer is no input: an answer of one token is the query alone.
    answer = Answer(ids=[0])
    collate = model.collator(padding_side="left")
    batch = collate([TrainingExample(query=query, answer=answer) for query in queries])
    device = model.prompt.embedding.device
    ids, mask, prompt_mask = (
        batch[name].to(device) for name in ("input_ids", "attention_mask", "prompt_mask")
    )
    return write(
        model.base,
        ids,
        mask,
        max_new_tokens=rules.max_new_tokens,
        end_ids=rules.end_ids,
        embeds=model.inputs_embeds(ids, prompt_mask),
        streamer=streamer,
    )
