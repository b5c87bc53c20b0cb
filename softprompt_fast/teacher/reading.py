"""How the teacher reads queries behind a context that they share, and writes and scores answers.

``SharedReader`` holds the context's keys and values once, for all queries (shared_prefix.py).
``BatchReader`` lends each batch a copy of them, or reads the context anew: for models whose
attention or state does not go through transformers' attention interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base_model.checks import on_one_side
from ..base_model.continuous_batching import Written, write_in_rows
from ..base_model.decoding import in_batches, pad, write
from ..base_model.output_head import hidden_states
from ..base_model.prefix_cache import Prefix
from ..base_model.shared_prefix import Rows

# Rows take little memory where they share a prefix, and many of them take little longer than few:
# as many are written at a time as have keys and values of this size, beyond ``batch_size``.
ROWS_MIB = 192


@dataclass(kw_only=True, frozen=True)
class _Reader:
    model: Any
    prefix: Prefix
    batch_size: int

    def states(self, rows: Sequence[list[int]]) -> list[Tensor]:
        """The hidden states [L, D] of each row behind the prefix."""
        states: dict[int, Tensor] = {}
        for batch in self._alike(list(map(len, rows))):
            states.update(self._states(rows, batch))
        return [states[index] for index in range(len(rows))]

    def _alike(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Batches of rows of about one length."""
        return in_batches(
            range(len(lengths)), self.batch_size, length=lengths.__getitem__, may_pad=True
        )

    def _states(self, rows: Sequence[list[int]], batch: list[int]) -> dict[int, Tensor]:
        raise NotImplementedError


class BatchReader(_Reader):
    """Queries in batches, each complete: the prefix, a query, an answer."""

    def write(
        self,
        asked: Sequence[list[int]],
        *,
        max_new_tokens: int,
        with_states: bool = False,
        on_written: Callable[[], Any] = lambda: None,
        **options: Any,
    ) -> list[Written]:
        """The answer to each of the queries. options: end_ids, do_sample and sampling of
        ``decoding.write``."""
        written: dict[int, list[int]] = {}
        for batch in self._batches(list(map(len, asked)), more=max_new_tokens):
            prefix = self.prefix
            ids, mask = pad([asked[index] for index in batch], side="left")
            ids = torch.cat([prefix.ids.expand(len(ids), -1), ids.to(prefix.ids.device)], dim=1)
            mask = torch.cat([torch.ones_like(ids[:, : prefix.length]), mask.to(ids)], dim=1)
            rows = write(
                self.model,
                ids,
                mask,
                max_new_tokens=max_new_tokens,
                past_key_values=prefix.cache_for(len(ids), ids.shape[1] + max_new_tokens),
                **options,
            )
            written.update(zip(batch, rows, strict=True))
            for _ in batch:
                on_written()
        answers = [Written(ids=written[index]) for index in range(len(asked))]
        if with_states:
            whole = [ids + answer.ids[:-1] for ids, answer in zip(asked, answers, strict=True)]
            for answer, states in zip(answers, self.states(whole), strict=True):
                answer.states = states[-len(answer.ids) :]
        return answers

    def _batches(self, lengths: Sequence[int], more: int) -> Iterator[list[int]]:
        """Of queries of about one length; of equal length where the model bears no padding."""
        whole = [self.prefix.length + length for length in lengths]
        for batch in self._alike(lengths):
            yield from in_batches(
                batch,
                self.batch_size,
                length=whole.__getitem__,
                may_pad=self.prefix.allows_gap(max(lengths[index] for index in batch) + more),
                switch=self.prefix.switch,
                more=more,
            )

    def _states(self, rows: Sequence[list[int]], batch: list[int]) -> dict[int, Tensor]:
        whole = [self.prefix.length + len(rows[index]) for index in batch]
        found: dict[int, Tensor] = {}
        for part in on_one_side(whole, self.prefix.switch):
            found.update(self._states_of_one_call(rows, batch[part]))
        return found

    def _states_of_one_call(self, rows: Sequence[list[int]], batch: list[int]) -> dict[int, Tensor]:
        prefix = self.prefix
        # Padding on the right: no real position sees it, and none is moved by it.
        padded = pad([rows[index] for index in batch], side="right")
        ids, mask = (tensor.to(prefix.ids.device) for tensor in padded)
        B, L = ids.shape
        mask = torch.cat([mask.new_ones(B, prefix.length), mask], dim=1)
        cache = prefix.cache_for(B, mask.shape[1])
        if cache is None:
            ids = torch.cat([prefix.ids.expand(B, -1), ids], dim=1)
        positions = torch.arange(mask.shape[1], device=ids.device)[-ids.shape[1] :]
        hidden = hidden_states(
            self.model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions.expand(B, -1),
            past_key_values=cache,
            use_cache=cache is not None,
        )[:, -L:]
        return {index: hidden[row, : len(rows[index])] for row, index in enumerate(batch)}


class SharedReader(_Reader):
    """Queries in rows that go on from one prefix; as ``BatchReader``."""

    def write(
        self, asked: Sequence[list[int]], *, max_new_tokens: int, **options: Any
    ) -> list[Written]:
        order = sorted(range(len(asked)), key=lambda index: len(asked[index]))
        capacity = max(map(len, asked)) + max_new_tokens
        row_bytes = max(1, capacity * self.prefix.token_bytes)
        most = max(self.batch_size, int(ROWS_MIB * 2**20 / row_bytes))
        rows = self._rows(min(most, len(asked)), capacity)
        written = write_in_rows(
            rows, [asked[index] for index in order], max_new_tokens=max_new_tokens, **options
        )
        found = dict(zip(order, written, strict=True))
        return [found[index] for index in range(len(asked))]

    def _states(self, rows: Sequence[list[int]], batch: list[int]) -> dict[int, Tensor]:
        ids, _ = pad([rows[index] for index in batch], side="right")
        own = self._rows(len(batch), ids.shape[1])
        hidden = own.read(ids, [0] * len(batch), range(len(batch)))
        return {index: hidden[row, : len(rows[index])] for row, index in enumerate(batch)}

    def _rows(self, num_rows: int, capacity: int) -> Rows:
        return Rows(self.model, self.prefix, num_rows=num_rows, capacity=capacity)
