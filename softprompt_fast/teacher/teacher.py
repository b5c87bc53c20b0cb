"""The teacher: the frozen model with the context in place.

It reads ``before + context`` once, shares those keys and values with every query of a batch, writes
the answers that the data does not give, and records the hidden states that predict them, or their
sketches.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..base_model.activation_checkpointing import without_checkpointing
from ..base_model.checks import check_ids, position_limit, position_switch
from ..base_model.continuous_batching import Written
from ..base_model.decoding import PLAIN, Sampling, end_ids
from ..base_model.fingerprint import quantization, settle
from ..base_model.held_prefix import AS_READ, PrefixDevice, PrefixDtype, PrefixForm
from ..base_model.output_head import OutputHead
from ..base_model.prefix_cache import Prefix
from ..base_model.shared_prefix import why_not_shared
from ..data.queries import Query, teacher_ids
from ..losses.functional import linear_kl
from ..utils.console import progress
from .answers import Answer, SketchOptions, keep_sketches, keep_states
from .reading import BatchReader, SharedReader

# A shard is this many batches. No batch has queries of two shards, so each can be kept, lost and
# computed again without a change to another.
SHARD_BATCHES = 4

LEAST_CONTEXT = 16

# What a form of the prefix costs is measured on so much, so that this takes the same short time
# behind a long context too.
MEASURED_PREFIX, MEASURED_QUERIES, MEASURED_ANSWER = 4096, 4, 64


class Reading:
    """What several calls of ``Teacher.answer`` share."""

    def __init__(
        self, model: PreTrainedModel, bar: tqdm | None = None, form: PrefixForm = AS_READ
    ) -> None:
        self.model = model
        self.form = form
        self.bar = bar or tqdm(disable=True)
        self._last: tuple[tuple[int, ...], Prefix] | None = None

    def prefix(self, ids: tuple[int, ...]) -> Prefix:
        """Read, unless it is the one that was read last."""
        if self._last is None or self._last[0] != ids:
            self._last = ids, Prefix.read(self.model, ids, self.form)
        return self._last[1]


class Teacher:
    """Answers queries with the full context."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        do_sample: bool = False,
        sampling: Sampling = PLAIN,
        max_context_tokens: int | None = None,
        prefix_dtype: PrefixDtype = "auto",
        prefix_device: PrefixDevice = "auto",
        show_progress: bool = True,
    ) -> None:
        """Puts ``model`` into evaluation mode: with dropout, its answers would be another's.

        do_sample: draw from the model's distribution instead of taking its maximum; sampling: how.
        max_context_tokens: of a longer context ``make_examples`` gives it an excerpt.
        prefix_dtype, prefix_device: of the keys and values of the context, ``auto`` or ``int8``,
        ``auto`` or ``cpu``; ValueError if the model does not share them among the queries.
        """
        for name, value, least in (
            ("max_new_tokens", max_new_tokens, 1),
            ("batch_size", batch_size, 1),
            ("max_context_tokens", max_context_tokens, LEAST_CONTEXT),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}: got {value}.")
        if not model.config.return_dict:
            raise ValueError(
                f"{type(model).__name__}: config.return_dict must be True: got False, with which "
                "transformers cannot generate. Set model.config.return_dict = True."
            )
        self.model: Any = model.eval()
        if quantization(model.config) is not None:
            settle(model)
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.do_sample = do_sample
        self.sampling = sampling
        self.max_context_tokens = max_context_tokens
        self.show_progress = show_progress
        self.end_ids = end_ids(model, tokenizer)
        self._noted: set[str] = set()
        self._shares_prefix: bool | None = None  # not known yet
        self.form = PrefixForm(dtype=prefix_dtype, device=prefix_device)
        self._has_measured_form = self.form.dtype == "auto"
        if self.form != AS_READ:
            self._check_shares_prefix()

    @torch.no_grad()
    def answer(
        self,
        queries: Sequence[Query],
        answers: Sequence[list[int] | None] | None = None,
        *,
        record_hidden: bool = False,
        sketch: SketchOptions | None = None,
        reading: Reading | None = None,
    ) -> list[Answer]:
        """One answer for each query, in their order.

        answers: the token ids that the data gives, None where the teacher has to write them.
        record_hidden, sketch: what the answers get besides their ids. reading: of ``one_reading``.
        Raises ValueError naming the query if an answer is empty, or if the context, the query and
        the answer do not fit into the model's positions; or if the model's head is not linear and
        a sketch is asked for.
        """
        given = list(answers) if answers is not None else [None] * len(queries)
        for query, ids in zip(queries, given, strict=True):
            self._check_length(query, ids)
            check_ids(self.model, chain(teacher_ids(query), ids or ()), query.source)
        self._say_what_is_not_shared(queries)
        head = OutputHead.from_model(self.model)
        if sketch is not None and head.softcap is not None:
            raise ValueError(
                f"a sketch needs a linear head: {type(self.model).__name__} caps its logits at "
                f"{head.softcap}. Record hidden states instead."
            )
        record = record_hidden or sketch is not None
        known = {index: Answer(ids=ids) for index, ids in enumerate(given) if ids is not None}
        unread = [index for index in range(len(queries)) if record or index not in known]
        shared = self.one_reading(len(unread)) if reading is None else nullcontext(reading)
        with shared as reading, without_checkpointing(self.model):
            for part in self.shards(len(queries)):
                indices = [index for index in unread if part.start <= index < part.stop]
                for prefix, group in self._sharing_a_prefix(reading, queries, indices):
                    states = self._read(reading, prefix, queries, group, known, record)
                    answered = [known[index] for index in group]
                    if record_hidden:
                        keep_states(answered, states)
                    if sketch is not None:
                        keep_sketches(answered, states, head, sketch)
        return [known[index] for index in range(len(queries))]

    def shards(self, num_queries: int) -> list[slice]:
        """The parts of so many queries that share no batch."""
        size = SHARD_BATCHES * self.batch_size
        return [slice(i, min(i + size, num_queries)) for i in range(0, num_queries, size)]

    @contextmanager
    def one_reading(self, num_queries: int) -> Iterator[Reading]:
        """For several calls of ``answer``: one progress bar, and a prefix kept until the next."""
        silent = not (self.show_progress and num_queries)
        with tqdm(total=num_queries, desc="teacher", unit="query", disable=silent) as bar:
            yield Reading(self.model, bar, self.form)

    def reader(self, prefix: Prefix, longest: int) -> BatchReader | SharedReader:
        """How rows behind the prefix are read. longest: tokens of the longest one, prefix and
        answer included."""
        if self._shares_prefix is None:
            reason = why_not_shared(self.model, prefix)
            self._shares_prefix = reason is None
            if reason is not None and self.show_progress:
                progress(
                    f"Note: {type(self.model).__name__} does not share one context among the "
                    f"queries ({reason}): each batch has its own, which takes memory and time"
                )
        # Keys that are turned otherwise in a call beyond the switch are of no use to it.
        turns = prefix.length <= prefix.switch < longest
        kind = SharedReader if self._shares_prefix and not turns else BatchReader
        return kind(model=self.model, prefix=prefix, batch_size=self.batch_size)

    def _sharing_a_prefix(
        self, reading: Reading, queries: Sequence[Query], indices: list[int]
    ) -> Iterator[tuple[Prefix, list[int]]]:
        """Groups of queries with the same ``before + context``, which is read once."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index in indices:
            groups[tuple(queries[index].before + queries[index].context)].append(index)
        for ids, group in groups.items():
            yield reading.prefix(ids), group

    def _read(
        self,
        reading: Reading,
        prefix: Prefix,
        queries: Sequence[Query],
        group: list[int],
        known: dict[int, Answer],
        with_states: bool,
    ) -> list[Tensor]:
        """Adds the answers of a group to those that are ``known``; their hidden states [n, D]."""
        given = [index for index in group if index in known]
        unanswered = [index for index in group if index not in known]
        reading.bar.update(len(given))
        written: dict[int, Written] = {}
        if unanswered:
            written = self._write(reading, prefix, queries, unanswered, with_states)
        known |= {index: Answer(ids=one.ids) for index, one in written.items()}
        self._measure_form(prefix, queries, group, known)
        if not with_states:
            return []
        states = self._score(prefix, queries, given, known)
        states |= {index: cast(Tensor, one.states) for index, one in written.items()}
        return [states[index] for index in group]

    def _write(
        self,
        reading: Reading,
        prefix: Prefix,
        queries: Sequence[Query],
        unanswered: list[int],
        with_states: bool,
    ) -> dict[int, Written]:
        asked = [queries[index].after for index in unanswered]
        longest = prefix.length + max(map(len, asked)) + self.max_new_tokens
        written = self.reader(prefix, longest).write(
            asked,
            max_new_tokens=self.max_new_tokens,
            end_ids=self.end_ids,
            do_sample=self.do_sample,
            sampling=self.sampling,
            with_states=with_states,
            on_written=reading.bar.update,
        )
        return dict(zip(unanswered, written, strict=True))

    def _score(
        self,
        prefix: Prefix,
        queries: Sequence[Query],
        answered: list[int],
        answers: dict[int, Answer],
    ) -> dict[int, Tensor]:
        """Hidden states [n, D] at the positions that predict each answer."""
        if not answered:
            return {}
        # The last token of an answer predicts nothing that is asked for.
        rows = [queries[index].after + answers[index].ids[:-1] for index in answered]
        read = self.reader(prefix, prefix.length + max(map(len, rows))).states(rows)
        return {
            index: states[len(queries[index].after) - 1 :]
            for index, states in zip(answered, read, strict=True)
        }

    @torch.no_grad()
    def _check_shares_prefix(self) -> None:
        reason = why_not_shared(self.model, Prefix.read(self.model, []))
        if reason is not None:
            raise ValueError(
                f"prefix_dtype={self.form.dtype}, prefix_device={self.form.device}: "
                f"{type(self.model).__name__} does not share one context among the queries "
                f"({reason}). Leave both at auto."
            )
        self._shares_prefix = True

    def _measure_form(
        self, prefix: Prefix, queries: Sequence[Query], group: list[int], known: dict[int, Answer]
    ) -> None:
        """Once: says how far predictions behind the prefix are from those in the model's dtype."""
        if self._has_measured_form or not prefix.length:
            return
        self._has_measured_form = True
        few = group[:MEASURED_QUERIES]
        answers = {index: Answer(ids=known[index].ids[:MEASURED_ANSWER]) for index in few}
        ids = prefix.ids[0, :MEASURED_PREFIX].tolist()
        own, held = (
            torch.cat(list(self._score(prefix, queries, few, answers).values()))
            for prefix in (Prefix.read(self.model, ids, form) for form in (AS_READ, self.form))
        )
        head = OutputHead.from_model(self.model)
        kl = float(linear_kl(held, head.weight, own, **head.loss_options()))
        first = "" if len(ids) == prefix.length else f"the first {len(ids)} tokens of "
        dtype = str(self.model.dtype).removeprefix("torch.")
        progress(
            f"Keys and values of the context in 8 bits: KL({dtype} || int8) is {kl:.1e} nats a "
            f"token behind {first}the context ({len(own)} answer tokens of {len(few)} queries)"
        )

    def _say_what_is_not_shared(self, queries: Sequence[Query]) -> None:
        switch = position_switch(self.model)
        if switch == math.inf:
            return
        passing = [
            query
            for query in queries
            if len(query.before + query.context) <= switch < len(teacher_ids(query))
        ]
        if passing:
            self.note_once(
                "switch",
                f"Note: {type(self.model).__name__} turns all keys otherwise in a call of more "
                f"than {switch} tokens: {len(passing)} queries pass that, and the context is read "
                "anew for each batch of them",
            )

    def note_once(self, about: str, text: str) -> None:
        if about not in self._noted:
            self._noted.add(about)
            progress(text)

    def _check_length(self, query: Query, ids: list[int] | None) -> None:
        name = query.source or f"the query that ends in tokens {query.after[-5:]}"
        if ids is not None and not ids:
            raise ValueError(f"{name}: the answer has no tokens.")
        limit = position_limit(self.model)
        asked = len(teacher_ids(query))
        answer = self.max_new_tokens if ids is None else len(ids)
        if limit is not None and asked + answer > limit:
            raise ValueError(
                f"{name}: context and query take {asked} tokens and the answer "
                f"{'up to ' if ids is None else ''}{answer}, but the model has {limit} positions. "
                "Shorten the context or the answer."
            )
