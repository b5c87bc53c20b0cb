"""From records to tokens: queries around their contexts, answers of the data or of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .answers import SketchOptions
from .answers_together import answer_together
from .arguments import SoftPromptTrainingArguments
from .data.queries import Query, tokenize_answer, tokenize_query
from .data.records import Record
from .model import SoftPromptModel, TrainingExample
from .teacher import Teacher
from .teacher_cache import TeacherCache
from .teacher_facts import teacher_facts
from .teacher_store import sketch_problem
from .utils.console import progress

# From this share on, cut answers are said with what to do: the prompt seldom learns how one ends.
OFTEN_CUT = 0.2


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

    record_hidden, sketch: what the answers hold besides their ids. cache: what it holds is not
    computed, and what is computed goes there. together: all processes of the run call this at once,
    and share the work.
    Raises ValueError if a record has no context: neither its own nor ``context``; and OSError or
    ValueError as the cache does.
    """
    check_contexts(records, context)
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
    return examples


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
        tokenize_query(tokenizer, r.messages, r.context or context or "", source=r.source)
        for r in records
    ]


def check_examples(
    name: str,
    dataset: Sequence[TrainingExample],
    model: SoftPromptModel,
    args: SoftPromptTrainingArguments,
    teacher: Teacher | None = None,
) -> None:
    """Raises TypeError or ValueError, naming ``name`` or the example, if ``dataset`` cannot be
    learned: it is empty, too long for the model, or lacks what the objective needs, which a
    ``teacher`` may be asked for instead."""
    if not len(dataset):
        raise ValueError(f"{name} has no examples: give at least one, or leave it out.")
    for example in dataset:
        if not isinstance(example, TrainingExample):
            raise TypeError(
                f"{name} must hold TrainingExample: got {type(example).__name__}. "
                "Call softprompt_fast.examples.make_examples."
            )
        if args.needs_teacher_states and teacher is None:
            _check_teacher_is_known(example, args, model.head.softcap)
        model.check_length(example.query, len(example.answer.ids))


def _check_teacher_is_known(
    example: TrainingExample, args: SoftPromptTrainingArguments, softcap: float | None
) -> None:
    name, answer = example.query.source or "an example", example.answer
    if answer.hidden is None and answer.sketch is None:
        raise ValueError(
            f"objective={args.objective!r} needs the teacher's hidden states or sketches: "
            f"{name} has none. Call Teacher.answer(..., record_hidden=True), or give the trainer a "
            "teacher."
        )
    problem = sketch_problem(args, softcap) if answer.sketch is not None else None
    if problem is not None:
        raise ValueError(
            f"{name} holds a sketch of the teacher: {problem}. "
            "Call Teacher.answer(..., record_hidden=True) without sketch."
        )


def check_contexts(records: Sequence[Record], context: str | None) -> None:
    for record in records:
        if not (record.context or context or "").strip():
            raise ValueError(
                f"{record.source}: no field 'context', and no --context_file for the whole run "
                "(in Python: no argument context)"
            )
