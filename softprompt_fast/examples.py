"""From records to tokens: queries around their contexts, answers of the data or of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .console import progress
from .data import Record
from .model import TrainingExample
from .prompting import Query, tokenize_answer, tokenize_query
from .teacher import Teacher


def make_examples(
    teacher: Teacher,
    tokenizer: Any,
    records: Sequence[Record],
    context: str | None,
    *,
    record_hidden: bool,
) -> list[TrainingExample]:
    """Tokenised queries with the answers of the data, or else of the teacher."""
    queries = tokenize_records(tokenizer, records, context)
    given = [
        None if r.completion is None else tokenize_answer(tokenizer, r.completion) for r in records
    ]
    answers = teacher.answer(queries, given, record_hidden=record_hidden)
    cut = sum(
        given_ids is None and answer.ids[-1] not in teacher.end_ids
        for given_ids, answer in zip(given, answers, strict=True)
    )
    if cut:
        progress(
            f"{cut} of {len(records)} answers of the teacher reached max_new_tokens="
            f"{teacher.max_new_tokens} and were cut there"
        )
    return [TrainingExample(query=q, answer=a) for q, a in zip(queries, answers, strict=True)]


def tokenize_records(tokenizer, records: Sequence[Record], context: str | None) -> list[Query]:
    return [
        tokenize_query(tokenizer, r.messages, r.context or context or "", source=r.source)
        for r in records
    ]


def check_contexts(records: Sequence[Record], context: str | None) -> None:
    for record in records:
        if record.context is None and context is None:
            raise ValueError(
                f"{record.source}: no field 'context', and no --context_file for the whole run"
            )
