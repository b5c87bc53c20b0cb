"""Queries about a context, written by the model that is to do without it, and its answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..base_model.checks import position_limit
from ..base_model.decoding import Sampling
from ..data.queries import Query, text_ids, tokenize_answer, tokenize_query
from ..data.records import Record
from ..teacher.examples import by_context, in_place, tokenize_records
from ..teacher.excerpts import Room, with_excerpts
from ..teacher.teacher import LEAST_CONTEXT, Teacher
from ..utils.text import text_of
from .directory import SynthesisDirectory
from .kinds import EXAMPLES, KINDS, asking_for
from .plan import QueryPlan, Visit, number_of


def write_queries(plan: QueryPlan, writer: Writer, directory: SynthesisDirectory) -> None:
    """Fill the plan: first with what the directory holds, then with what is kept there.

    Raises ValueError if what it holds is not of this plan.
    """
    done = [entry for entry in directory.entries if "visit" in entry]
    with tqdm(total=plan.num_queries, desc="queries", unit="query") as progress:
        while (visit := plan.next_visit()) is not None:
            if done:
                entry = done.pop(0)
                directory.check_entry(entry["visit"] == visit.as_json())
            else:
                entry = {"visit": visit.as_json(), "texts": writer.write(visit)}
                directory.add(entry)
            plan.take(visit, entry["texts"])
            progress.update(len(plan.queries) - progress.n)
    directory.check_entry(not done)


def answer_queries(
    teacher: Teacher,
    tokenizer: Any,
    records: Sequence[Record],
    context: str,
    directory: SynthesisDirectory,
) -> list[list[int]]:
    """The token ids of the answer to each query, a batch of which is kept at a time."""
    done = [entry for entry in directory.entries if "answers" in entry]
    answers: list[list[int]] = []
    order, in_order = by_context(with_excerpts(teacher, tokenizer, records, context))
    queries = tokenize_records(tokenizer, in_order, context)
    with teacher.one_reading(len(queries)) as reading:
        while len(answers) < len(queries):
            batch = queries[len(answers) : len(answers) + teacher.batch_size]
            if done:
                entry = done.pop(0)
                directory.check_entry(len(entry["answers"]) == len(batch))
                reading.bar.update(len(batch))
            else:
                written = teacher.answer(batch, reading=reading)
                entry = {"answers": [answer.ids for answer in written]}
                directory.add(entry)
            answers += entry["answers"]
    return in_place(order, answers)


def recipe_sha256() -> str:
    """Of what models are told: with other words, they write other queries."""
    return hashlib.sha256(repr((EXAMPLES, KINDS)).encode()).hexdigest()


def record_of(text: str, *, context_span: tuple[int, int] | None = None) -> Record:
    return Record(
        messages=[{"role": "user", "content": text}],
        completion=None,
        context=None,
        source=f"the query {text!r}",
        context_span=context_span,
    )


def longest_query(tokenizer: Any, max_query_tokens: int) -> int:
    """In tokens: its opening, and what the model writes after it."""
    openings = (opening for kind in KINDS.values() for opening in kind.openings)
    return max_query_tokens + max(len(text_ids(tokenizer, text)) for text in openings)


def check_context_fits(
    teacher: Teacher, tokenizer: Any, context: str, max_query_tokens: int
) -> None:
    """Raises ValueError if the model cannot read a query, its answer and some of the context."""
    (query,) = tokenize_records(tokenizer, [record_of("?")], context)
    asked = len(query.before + query.after) + longest_query(tokenizer, max_query_tokens)
    room = Room(teacher, asked + teacher.max_new_tokens)
    if len(query.context) > room.whole and room.excerpt < LEAST_CONTEXT:
        raise ValueError(
            f"a query takes up to {asked} tokens and the answer up to {teacher.max_new_tokens}, "
            f"but the model has {position_limit(teacher.model)} positions, and should read some of "
            "the context with them. Lower max_query_tokens or max_new_tokens."
        )


class Writer:
    """Has the model write the texts of a visit: the same ones, whatever was written before."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        chunks: Sequence[str],
        *,
        max_query_tokens: int,
        batch_size: int,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chunks = chunks
        self.seed = seed
        self.teacher = Teacher(
            model,
            tokenizer,
            max_new_tokens=max_query_tokens,
            batch_size=batch_size,
            do_sample=True,
            sampling=sampling,
            show_progress=False,
        )

    def write(self, visit: Visit) -> list[str]:
        """Each with its opening; with a line break at the end if the model ended it there."""
        openings = [text_ids(self.tokenizer, text) for text in visit.openings]
        asked = self._prompt(visit.kind, visit.wording, visit.chunk)
        rows = [asked + opening for opening in openings]
        # All that they share is read once; a row has to keep a token.
        common = min(len(asked), *(len(row) - 1 for row in rows))
        queries = [
            Query(
                before=row[:common],
                context=[],
                after=row[common:],
                plain=row,
                source=f"chunk {visit.chunk} of the context",
            )
            for row in rows
        ]
        cuda = [self.model.device.index] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(number_of(self.seed, "visit", visit.number) >> 1)
            answers = self.teacher.answer(queries)
        return [
            self._text(opening, answer.ids)
            for opening, answer in zip(openings, answers, strict=True)
        ]

    def check_length(self, kinds: Sequence[str]) -> None:
        """Raises ValueError if the longest chunk leaves no room to write a query."""
        limit = position_limit(self.model)
        longest = max(range(len(self.chunks)), key=lambda chunk: len(self.chunks[chunk]))
        prompts = (
            len(self._prompt(kind, wording, longest))
            for kind in kinds
            for wording in range(len(KINDS[kind].instructions))
        )
        asked = max(prompts)
        query = longest_query(self.tokenizer, self.teacher.max_new_tokens)
        if limit is not None and asked + query > limit:
            raise ValueError(
                f"a chunk and what is asked about it take {asked} tokens and the query up to "
                f"{query}, but the model has {limit} positions. Lower chunk_tokens or "
                "max_query_tokens."
            )

    def _prompt(self, kind: str, wording: int, chunk: int) -> list[int]:
        messages = asking_for(kind, wording, self.chunks[chunk])
        return tokenize_query(self.tokenizer, messages, "").plain

    def _text(self, opening: list[int], ids: list[int]) -> str:
        ended = ids[-1] in self.teacher.end_ids
        text = text_of(self.tokenizer, opening + ids, skip_special_tokens=True)
        return text + "\n" if ended else text


def completion(tokenizer: Any, ids: list[int], end_ids: Sequence[int]) -> str | None:
    """The answer as the text that training reads as these very ids; None where no text is.

    Training closes every answer that the data gives. One that was cut has no end, and would get one
    where the teacher goes on.
    """
    text = text_of(tokenizer, ids[:-1])
    same = text.strip() and tokenize_answer(tokenizer, text, end_ids) == ids
    return text if same else None
