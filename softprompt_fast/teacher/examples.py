"""From records to tokens: queries around their contexts, answers of the data or of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..data.queries import Query, tokenize_answer, tokenize_query
from ..data.records import Record
from ..utils.console import progress
from .answers import Answer, SketchOptions
from .cache import TeacherCache
from .distributed import answer_together
from .excerpts import with_excerpts
from .facts import teacher_facts
from .teacher import Teacher

Value = TypeVar("Value")

# From this share on, cut answers are said with what to do: the prompt seldom learns how one ends.
OFTEN_CUT = 0.2


@dataclass(kw_only=True, eq=False)
class TrainingExample:
    """A query and the answer that the student has to learn."""

    query: Query
    answer: Answer

    def __post_init__(self) -> None:
        answer = self.answer
        known = {"hidden states": answer.hidden}
        known["sketches"] = None if answer.sketch is None else answer.sketch.tail
        for name, values in known.items():
            if not answer.ids or (values is not None and len(values) != len(answer.ids)):
                raise ValueError(
                    f"{self.query.source or 'query'}: an answer needs at least one token, and what "
                    f"is known of the teacher for each: got {len(answer.ids)} tokens and "
                    f"{'no' if values is None else len(values)} {name}."
                )


def make_examples(
    teacher: Teacher,
    tokenizer: Any,
    records: Sequence[Record],
    context: str | None,
    *,
    record_hidden: bool,
    sketch: SketchOptions | None = None,
    cache: TeacherCache | None = None,
    together: bool = False,
) -> list[TrainingExample]:
    """Tokenised queries with the answers of the data, or else of the teacher.

    Of a context that is too long for the teacher, a query has an excerpt (``with_excerpts``).
    record_hidden, sketch: what the answers hold besides their ids. cache: what it holds is not
    computed, and what is computed goes there. together: all processes of the run call this at once,
    and share the work.
    Raises ValueError if a record has no context: neither its own nor ``context``; and OSError or
    ValueError as the cache does.
    """
    check_contexts(records, context)
    order, records = by_context(with_excerpts(teacher, tokenizer, records, context))
    queries = tokenize_records(tokenizer, records, context)
    given = [
        None
        if record.completion is None
        else tokenize_answer(tokenizer, record.completion, teacher.end_ids)
        for record in records
    ]
    form: dict[str, Any] = {"record_hidden": record_hidden, "sketch": sketch}
    if cache is None:
        answers = (answer_together if together else Teacher.answer)(teacher, queries, given, **form)
    else:
        facts = teacher_facts(teacher, tokenizer, context, **form)
        answers = cache.answers(teacher, queries, given, facts, **form)
    examples = [TrainingExample(query=q, answer=a) for q, a in zip(queries, answers, strict=True)]
    cut = count_cut(records, examples, teacher)
    if cut:
        advice = "; --max_new_tokens takes more" if cut >= OFTEN_CUT * len(records) else ""
        progress(
            f"{cut} of {len(records)} answers of the teacher reached max_new_tokens="
            f"{teacher.max_new_tokens} and were cut there{advice}"
        )
    return in_place(order, examples)


def by_context(records: Sequence[Record]) -> tuple[list[int], list[Record]]:
    """Those that share a context after each other, so that it is read once; and which they are."""
    first = {record.context: index for index, record in reversed(list(enumerate(records)))}
    order = sorted(range(len(records)), key=lambda index: first[records[index].context])
    return order, [records[index] for index in order]


def in_place(order: Sequence[int], values: Sequence[Value]) -> list[Value]:
    """What came of the records of ``by_context``, where the records stood before."""
    found = dict(zip(order, values, strict=True))
    return [found[index] for index in range(len(order))]


def count_cut(
    records: Sequence[Record], examples: Sequence[TrainingExample], teacher: Teacher
) -> int:
    """How many answers are the teacher's and stop at its max_new_tokens."""
    return sum(
        record.completion is None and example.answer.ids[-1] not in teacher.end_ids
        for record, example in zip(records, examples, strict=True)
    )


def tokenize_records(tokenizer, records: Sequence[Record], context: str | None) -> list[Query]:
    return [
        tokenize_query(tokenizer, r.messages, r.context_or(context), source=r.source)
        for r in records
    ]


def check_contexts(records: Sequence[Record], context: str | None) -> None:
    for record in records:
        if not record.context_or(context).strip():
            raise ValueError(
                f"{record.source}: no field 'context', and no --context_file for the whole run "
                "(in Python: no argument context)"
            )
