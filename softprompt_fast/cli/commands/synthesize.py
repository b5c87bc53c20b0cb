"""The command ``synthesize``: queries about a context, written and answered by the model."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from ...base_model.decoding import Sampling
from ...base_model.loading import check_dtype, load_model
from ...data.queries import text_ids
from ...data.records import read_text
from ...synthesis.chunks import cut_into_chunks
from ...synthesis.directory import HELDOUT_FILE, TRAIN_FILE, SynthesisDirectory
from ...synthesis.filters import hold_out
from ...synthesis.kinds import KINDS
from ...synthesis.plan import Plan
from ...synthesis.writer import (
    Writer,
    answer_queries,
    check_context_fits,
    completion,
    recipe_sha256,
    tokenize_queries,
    write_queries,
)
from ...teacher.facts import teacher_facts
from ...teacher.teacher import Teacher
from ...utils.console import closest, progress, say
from ...utils.errors import check_at_least
from ..command import Command, Invocation

# Where things lie; and what changes nothing that is written.
FREE_OPTIONS = frozenset(["output_dir", "context_file", "trust_remote_code"])


@dataclass(kw_only=True)
class SynthesizeOptions:
    model: str = field(metadata={"help": "Directory or Hub id of the frozen language model."})
    context_file: str = field(metadata={"help": "Text file: the context to ask about."})
    output_dir: str = field(
        metadata={"help": "Directory for the queries; what was stopped goes on there."}
    )
    num_queries: int = field(default=128, metadata={"help": "Queries to write, held out or not."})
    heldout: float = field(default=0.2, metadata={"help": "Share of them that is held out."})
    num_heldout: int | None = field(
        default=None, metadata={"help": "Number of them that is held out, in place of the share."}
    )
    kinds: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"Of {', '.join(KINDS)}."}
    )
    chunk_tokens: int = field(
        default=256, metadata={"help": "Longest part of the context that is asked about at a time."}
    )
    max_query_tokens: int = field(default=48, metadata={"help": "Longest query, in tokens."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(
        default=0.7, metadata={"help": "Of the draw of queries: higher is more varied, and wilder."}
    )
    top_p: float = field(
        default=0.95, metadata={"help": "Only tokens of this share of the probability are drawn."}
    )
    batch_size: int = field(default=16, metadata={"help": "Queries written, or answered, at once."})
    seed: int = field(default=0, metadata={"help": "Of the draws of queries and of the split."})
    dtype: str = field(
        default="auto",
        metadata={"help": "auto (the checkpoint's own), float32, bfloat16, float16"},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository brings."}
    )

    def __post_init__(self) -> None:
        at_least_1 = ("num_queries", "max_query_tokens", "max_new_tokens", "batch_size")
        check_at_least(self, 1, *at_least_1)
        check_at_least(self, 16, "chunk_tokens")
        check_at_least(self, 0.01, "temperature")
        check_at_least(self, 0, "heldout", "num_heldout")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1: got {self.top_p}.")
        if self.heldout >= 1:
            raise ValueError(f"heldout is a share below 1: got {self.heldout}.")
        if self.num_heldout is not None and self.num_heldout >= self.num_queries:
            raise ValueError(
                f"num_heldout must leave a query to train on: got {self.num_heldout} of "
                f"num_queries={self.num_queries}."
            )
        if not self.kinds:
            raise ValueError(f"kinds is empty: name some of {', '.join(KINDS)}.")
        for kind in self.kinds:
            if kind not in KINDS:
                hint = closest(kind, KINDS)
                raise ValueError(f"kinds must be of {', '.join(KINDS)}: got {kind!r}{hint}")
        self.kinds = [kind for kind in KINDS if kind in self.kinds]
        check_dtype(self.dtype)

    def num_held_out(self, num_queries: int) -> int:
        """Of so many; one is always left to train on."""
        wanted = round(self.heldout * num_queries) if self.num_heldout is None else self.num_heldout
        return min(wanted, num_queries - 1)


def synthesize(options: SynthesizeOptions, invocation: Invocation) -> int:
    """Raises ValueError or OSError, before the model loads wherever that can be known."""
    started = time.perf_counter()
    digest = hashlib.sha256()
    context = read_text(options.context_file, digest)
    decisive = decisive_options(options, digest.hexdigest())
    directory = SynthesisDirectory(options.output_dir, decisive)
    with directory.owned():
        if directory.is_finished:
            directory.clear()
            say(f"{directory.path} holds these queries: nothing is left to write.")
        else:
            write(options, context, directory)
            say(f"This took {time.perf_counter() - started:.0f} s.")
    return 0


def decisive_options(options: SynthesizeOptions, context_sha256: str) -> dict[str, Any]:
    """All that the result depends on; the context by its content, so that the file may move."""
    values = {n: v for n, v in asdict(options).items() if n not in FREE_OPTIONS}
    model = os.path.expanduser(options.model)
    if os.path.isdir(model):
        values["model"] = os.path.abspath(model)
    return {**values, "context_sha256": context_sha256, "recipe_sha256": recipe_sha256()}


def write(options: SynthesizeOptions, context: str, directory: SynthesisDirectory) -> None:
    """From the model on."""
    model, tokenizer = load_model(
        options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code
    )
    batch_size = options.batch_size
    teacher = Teacher(
        model, tokenizer, max_new_tokens=options.max_new_tokens, batch_size=batch_size
    )
    check_context_fits(teacher, tokenizer, context, options.max_query_tokens)
    chunks = cut_into_chunks(
        context, options.chunk_tokens, lambda text: len(text_ids(tokenizer, text))
    )
    writer = Writer(
        model,
        tokenizer,
        chunks,
        max_query_tokens=options.max_query_tokens,
        batch_size=batch_size,
        sampling=Sampling(temperature=options.temperature, top_p=options.top_p),
        seed=options.seed,
    )
    writer.check_length(options.kinds)
    facts = teacher_facts(teacher, tokenizer, context)
    directory.start(facts)
    if directory.entries:
        progress(f"Going on after {len(directory.entries)} batches that {directory.path} holds")
    plan = Plan(
        chunks,
        options.kinds,
        num_queries=options.num_queries,
        batch_size=batch_size,
        seed=options.seed,
    )
    write_queries(plan, writer, directory)
    if not plan.queries:
        raise ValueError(
            f"the model wrote no query: {plan.num_texts} texts were dropped ({dropped(plan)}). "
            "Use a larger model, or one that was trained to follow instructions."
        )
    texts = [query.text for query in plan.queries]
    answers = answer_queries(teacher, tokenize_queries(tokenizer, texts, context), directory)
    completions = [completion(tokenizer, ids, teacher.end_ids) for ids in answers]
    files = split(options, plan, completions)
    counts = {
        "queries": len(plan.queries),
        "kinds": dict(Counter(query.kind for query in plan.queries)),
        "chunks": [sum(q.chunk == chunk for q in plan.queries) for chunk in range(len(chunks))],
        "texts": plan.num_texts,
        "dropped": dict(plan.dropped),
        "cut_answers": sum(ids[-1] not in teacher.end_ids for ids in answers),
        "completions": len(completions) - completions.count(None),
    }
    directory.finish(files, facts, counts=counts, chunks=chunks)
    tell(options, plan, counts)
    for name, records in files.items():
        say(f"{len(records)} queries are in {directory.path / name}")


def split(
    options: SynthesizeOptions, plan: Plan, completions: list[str | None]
) -> dict[str, list[dict[str, Any]]]:
    """The lines of each file."""
    queries = plan.queries
    number = options.num_held_out(len(queries))
    held_out = hold_out(
        [(query.chunk, query.kind) for query in queries],
        [query.text for query in queries],
        number,
        options.seed,
    )
    files: dict[str, list[dict[str, Any]]] = {TRAIN_FILE: [], HELDOUT_FILE: []}
    for index, (query, text) in enumerate(zip(queries, completions, strict=True)):
        answer = {} if text is None else {"completion": text}
        line = {"prompt": query.text, **answer, "kind": query.kind, "chunk": query.chunk}
        files[HELDOUT_FILE if index in held_out else TRAIN_FILE].append(line)
    return {name: lines for name, lines in files.items() if lines}


def tell(options: SynthesizeOptions, plan: Plan, counts: dict[str, Any]) -> None:
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts["kinds"].items())
    say(f"{counts['queries']} queries about {len(plan.chunks)} chunks: {kinds}")
    say(f"Of {plan.num_texts} texts that the model wrote, {dropped(plan)} were dropped.")
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


def dropped(plan: Plan) -> str:
    return (
        ", ".join(f"{number} {reason}" for reason, number in plan.dropped.most_common()) or "none"
    )


COMMAND = Command(
    description="Write queries about a context, and the model's answers to them.",
    options=(SynthesizeOptions,),
    run=synthesize,
)
