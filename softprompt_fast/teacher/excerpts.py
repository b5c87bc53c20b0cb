"""What the teacher reads of a context that is too long to be read with a query: an excerpt of it.

Such a context is cut into chunks, and is read in excerpts of as many of them as the model has
positions for. A query is answered from the excerpt around the chunk that it was written about
(``Record.context_span``), or else around the one that a lexical ranking finds for it. The soft
prompt learns from all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..base_model.checks import position_limit
from ..data.chunks import CHUNK_TOKENS, ChunkedText, around
from ..data.queries import Query, teacher_ids, tokenize_answer, tokenize_query
from ..data.records import Record
from .teacher import LEAST_CONTEXT, Teacher

# Excerpts are of a multiple of a 16th of the model's positions, so that a few tokens more or less
# in the longest query do not move their borders; and of 16 chunks or more.
PARTS = 16
# Queries that take more than this part of the positions, with their answers, make no excerpt
# shorter: the teacher refuses them.
MOST_ASKED = 1 / 2


def with_excerpts(
    teacher: Teacher, tokenizer: Any, records: Sequence[Record], context: str | None
) -> list[Record]:
    """The records, with what the teacher reads of their contexts: everything where that fits.

    Raises ValueError if a record is about characters that its context does not have.
    """
    texts = [record.context_or(context) for record in records]
    one_about = dict(zip(texts, records, strict=True))
    least = Room(teacher, _most_asked(teacher)).whole
    # No token is less than a byte, so most contexts need not be counted.
    tokens = {
        text: len(_tokenize(tokenizer, record, text).context)
        for text, record in one_about.items()
        if len(text.encode()) > least
    }
    if max(tokens.values(), default=0) <= least:
        return list(records)
    room = Room(teacher, _longest_asked(teacher, tokenizer, records))
    long = {text: number for text, number in tokens.items() if number > room.whole}
    if not long or room.excerpt < LEAST_CONTEXT:  # then the teacher says what does not fit
        return list(records)
    excerpts = {text: Excerpts(tokenizer, text, room.excerpt) for text in long}
    teacher.note_once("excerpts", _note(room, long, excerpts))
    return [
        replace(record, context=excerpts[text].of(record)) if text in excerpts else record
        for text, record in zip(texts, records, strict=True)
    ]


class Room:
    """Tokens of context that can be read with a query and an answer of ``asked`` tokens."""

    def __init__(self, teacher: Teacher, asked: int) -> None:
        limit = position_limit(teacher.model)
        whole = excerpt = teacher.max_context_tokens or sys.maxsize
        if limit is not None:
            step = max(1, limit // PARTS)
            left = limit - asked
            whole, excerpt = min(whole, left), min(excerpt, left // step * step)
        self.whole = whole
        self.excerpt = excerpt


class Excerpts:
    """The excerpts of one context."""

    def __init__(self, tokenizer: Any, text: str, most: int) -> None:
        """most: tokens of an excerpt."""
        chunk = min(CHUNK_TOKENS, max(1, most // PARTS))
        self.text = ChunkedText.of_tokens(tokenizer, text, chunk)
        self.all = self.text.excerpts(most)

    def of(self, record: Record) -> str:
        return self.text.text_of(around(self._chunks(record), self.all))

    def _chunks(self, record: Record) -> range:
        """What the record asks about."""
        if record.context_span is None:
            chunk = self.text.asked_about(record.asked)
            return range(chunk, chunk + 1)
        start, end = record.context_span
        characters = len(self.text.text)
        if end > characters:
            raise ValueError(
                f"{record.source}: context_span is [{start}, {end}], and the context has "
                f"{characters} characters. Is it the one that this query was written about?"
            )
        return self.text.at(start, end)


def _longest_asked(teacher: Teacher, tokenizer: Any, records: Sequence[Record]) -> int:
    """Tokens of a query without its context, and of its answer."""
    lengths = [_asked(teacher, tokenizer, record) for record in records]
    return max((length for length in lengths if length <= _most_asked(teacher)), default=0)


def _most_asked(teacher: Teacher) -> int:
    limit = position_limit(teacher.model)
    return sys.maxsize if limit is None else int(MOST_ASKED * limit)


def _asked(teacher: Teacher, tokenizer: Any, record: Record) -> int:
    query = _tokenize(tokenizer, record, "")
    if record.completion is None:
        answer = teacher.max_new_tokens
    else:
        answer = len(tokenize_answer(tokenizer, record.completion, teacher.end_ids))
    return len(teacher_ids(query)) + answer


def _tokenize(tokenizer: Any, record: Record, context: str) -> Query:
    return tokenize_query(tokenizer, record.messages, context, source=record.source)


def _note(room: Room, tokens: dict[str, int], excerpts: dict[str, Excerpts]) -> str:
    most = max(tokens.values())
    context = f"the context has {most:,} tokens"
    if len(tokens) > 1:
        context = f"{len(tokens):,} contexts have up to {most:,} tokens"
    number = sum(len(own.all) for own in excerpts.values())
    return (
        f"Note: {context}, and there is room for {room.whole:,} beside a query and its answer: the "
        f"teacher reads {number:,} excerpts of at most {room.excerpt:,}, and answers each query "
        "from the one around what it asks about"
    )
