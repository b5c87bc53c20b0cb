"""One synthesis in its directory: from the model to the files of queries and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..base_model.decoding import Sampling
from ..base_model.loading import load_model
from ..data.chat_template import DATE
from ..data.chunks import ChunkedText
from ..data.records import Record
from ..teacher.facts import teacher_facts
from ..teacher.teacher import Teacher
from ..utils.console import progress, say
from .directory import HELDOUT_FILE, TRAIN_FILE, SynthesisDirectory
from .filters import hold_out
from .options import SynthesizeOptions
from .plan import QueryPlan, Written
from .writer import (
    Writer,
    answer_queries,
    check_context_fits,
    completion,
    record_of,
    write_queries,
)


def run_synthesis(options: SynthesizeOptions, context: str, directory: SynthesisDirectory) -> None:
    """Has the model write queries about ``context`` and answer them, or go on with it.

    Raises ValueError if the model cannot read what it would have to, is another one than that
    which began, or writes no query.
    """
    model, tokenizer = load_model(
        options.model,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        chat_template_kwargs=options.chat_template_kwargs,
        chat_template_date=directory.read_state().get("model", {}).get(DATE),
    )
    teacher = Teacher(
        model,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        max_context_tokens=options.max_context_tokens,
        batch_size=options.batch_size,
        **options.of_prefix(),
    )
    check_context_fits(teacher, tokenizer, context, options.max_query_tokens)
    text = ChunkedText.of_tokens(tokenizer, context, options.chunk_tokens)
    writer = _make_writer(options, text.chunks, model, tokenizer)
    facts = teacher_facts(teacher, tokenizer, context)
    directory.start(facts)
    if directory.entries:
        progress(f"Going on after {len(directory.entries)} batches that {directory.path} holds")

    plan = _have_queries_written(options, writer, directory)
    records = [record_of(query.text, context_span=text.span(query.chunk)) for query in plan.queries]
    answers = answer_queries(teacher, tokenizer, records, context, directory)
    completions = [completion(tokenizer, ids, teacher.end_ids) for ids in answers]

    files = _split(options, plan.queries, records, completions)
    counts = {
        **_counts_of(plan),
        "cut_answers": sum(ids[-1] not in teacher.end_ids for ids in answers),
        "completions": len(completions) - completions.count(None),
    }
    directory.finish(files, facts, counts=counts, chunks=writer.chunks)
    _say_what_came_of_it(options, plan, counts)
    for name, lines in files.items():
        say(f"{len(lines)} queries are in {directory.path / name}")


def _make_writer(
    options: SynthesizeOptions, chunks: Sequence[str], model: PreTrainedModel, tokenizer: Any
) -> Writer:
    """Raises ValueError if the model cannot read a chunk and write a query about it."""
    writer = Writer(
        model,
        tokenizer,
        chunks,
        max_query_tokens=options.max_query_tokens,
        batch_size=options.batch_size,
        sampling=Sampling(temperature=options.temperature, top_p=options.top_p),
        seed=options.seed,
    )
    writer.check_length(options.kinds)
    return writer


def _have_queries_written(
    options: SynthesizeOptions, writer: Writer, directory: SynthesisDirectory
) -> QueryPlan:
    """Carried out, with a query at least."""
    plan = QueryPlan(
        writer.chunks,
        options.kinds,
        num_queries=options.num_queries,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    write_queries(plan, writer, directory)
    if not plan.queries:
        raise ValueError(
            f"the model wrote no query: {plan.num_texts} texts were dropped ({_dropped(plan)}). "
            "Use a larger model, or one that was trained to follow instructions."
        )
    return plan


def _split(
    options: SynthesizeOptions,
    queries: Sequence[Written],
    records: Sequence[Record],
    completions: Sequence[str | None],
) -> dict[str, list[dict[str, Any]]]:
    """The lines of each file."""
    held_out = hold_out(
        [(query.chunk, query.kind) for query in queries],
        [query.text for query in queries],
        options.num_held_out(len(queries)),
        options.seed,
    )
    files: dict[str, list[dict[str, Any]]] = {TRAIN_FILE: [], HELDOUT_FILE: []}
    for index, (query, record, text) in enumerate(zip(queries, records, completions, strict=True)):
        answer = {} if text is None else {"completion": text}
        about = {"kind": query.kind, "chunk": query.chunk, "context_span": record.context_span}
        line = {"prompt": query.text, **answer, **about}
        files[HELDOUT_FILE if index in held_out else TRAIN_FILE].append(line)
    return {name: lines for name, lines in files.items() if lines}


def _counts_of(plan: QueryPlan) -> dict[str, Any]:
    chunks = Counter(query.chunk for query in plan.queries)
    return {
        "queries": len(plan.queries),
        "kinds": dict(Counter(query.kind for query in plan.queries)),
        "chunks": [chunks[chunk] for chunk in range(len(plan.chunks))],
        "texts": plan.num_texts,
        "dropped": dict(plan.dropped),
    }


def _say_what_came_of_it(
    options: SynthesizeOptions, plan: QueryPlan, counts: dict[str, Any]
) -> None:
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts["kinds"].items())
    say(f"{counts['queries']} queries about {len(plan.chunks)} chunks: {kinds}")
    say(f"Of {plan.num_texts} texts that the model wrote, {_dropped(plan)} were dropped.")
    if len(plan.queries) < options.num_queries:
        say(
            f"No more than {len(plan.queries)} of {options.num_queries} queries were to be had. "
            "Raise --temperature, lower --chunk_tokens, or use a larger model."
        )
    missing = counts["queries"] - counts["completions"]
    if missing:
        say(
            f"{missing} answers are not in the files, {counts['cut_answers']} of them because they "
            f"reached max_new_tokens={options.max_new_tokens}: training has them written again."
        )


def _dropped(plan: QueryPlan) -> str:
    return (
        ", ".join(f"{number} {reason}" for reason, number in plan.dropped.most_common()) or "none"
    )
