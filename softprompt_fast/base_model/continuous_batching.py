"""Answers to queries behind one prefix: a row whose answer has ended makes place for the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from .decoding import PLAIN, Sampling, pad
from .output_head import OutputHead
from .shared_prefix import Rows

# Queries come in as soon as this part of the rows is free: one by one, each would have the weights
# read for it alone.
PART = 4
# Tokens of one call, for each of which its activations take memory.
MOST_READ = 1024
# Tokens of a row that are read again for the states of its answer, at the least. Products of fewer
# than 12 rows are divided among threads, so that their bits depend on how many there are.
LEAST_READ = 16


@dataclass(kw_only=True)
class Written:
    """What the model wrote, and perhaps the hidden states [n, D] that predict its tokens."""

    ids: list[int]
    states: Tensor | None = None


@torch.no_grad()
def write_in_rows(
    rows: Rows,
    asked: Sequence[list[int]],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    do_sample: bool = False,
    sampling: Sampling = PLAIN,
    with_states: bool = False,
    on_written: Callable[[], Any] = lambda: None,
) -> list[Written]:
    """What the model writes after the prefix and each of ``asked``, as ``decoding.write`` does.

    on_written: called at the end of each.
    """
    head = OutputHead.from_model(rows.model)
    draw = _Draw(sampling) if do_sample else None
    written = [Written(ids=[]) for _ in asked]
    waiting = deque(range(len(asked)))
    num_rows = rows.size[0]
    # Of each row that is not free, the index of what it answers.
    going_on: dict[int, int] = {}
    ended: dict[int, int] = {}
    while waiting or going_on:
        state: dict[int, Tensor] = {}  # of a row, after its last token
        if waiting and num_rows - len(going_on) >= min(max(1, num_rows // PART), len(waiting)):
            if with_states:
                _read_states(rows, ended, asked, written)
            ended = {}
            free = [row for row in range(num_rows) if row not in going_on]
            admitted = {row: waiting.popleft() for row in free[: len(waiting)]}
            texts = {row: asked[index] for row, index in admitted.items()}
            state |= {
                row: read[-1] for row, read in _read(rows, texts, start=dict.fromkeys(texts, 0))
            }
        else:
            admitted = {}
        if going_on:
            last_ids = torch.tensor([[written[index].ids[-1]] for index in going_on.values()])
            start = [len(asked[index]) + len(written[index].ids) - 1 for index in going_on.values()]
            hidden = rows.read(last_ids, start, list(going_on))
            state |= zip(going_on, hidden[:, 0], strict=True)
        going_on = dict(sorted((going_on | admitted).items()))
        logits = head.logits(torch.stack([state[row] for row in going_on]))
        tokens = logits.argmax(dim=-1) if draw is None else draw(logits)
        for (row, index), token in zip(list(going_on.items()), tokens.tolist(), strict=True):
            answer = written[index].ids
            answer.append(token)
            if token in end_ids or len(answer) == max_new_tokens:
                ended[row] = going_on.pop(row)
                on_written()
    if with_states:
        _read_states(rows, ended, asked, written)
    return written


def _read_states(
    rows: Rows, ended: dict[int, int], asked: Sequence[list[int]], written: Sequence[Written]
) -> None:
    """Of the answers that have ended, behind their queries, which are in their rows.

    Not those from which the tokens were chosen: products of one row are divided among the threads,
    so their bits would depend on how many there are.
    """
    # The last token of an answer predicts nothing that is asked for.
    whole = {row: asked[index] + written[index].ids[:-1] for row, index in ended.items()}
    # As many of each row: what is added to a shorter one may have no place behind its end.
    n = max(LEAST_READ, *(len(written[index].ids) for index in ended.values()), 0)
    start = {row: max(0, len(tokens) - n) for row, tokens in whole.items()}
    texts = {row: tokens[start[row] :] for row, tokens in whole.items()}
    for row, read in _read(rows, texts, start):
        answer = written[ended[row]]
        answer.states = read[-len(answer.ids) :].clone()


def _read(
    rows: Rows, texts: dict[int, list[int]], start: dict[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """By row, the hidden states [n, D] of the tokens that it reads from ``start`` on."""
    left = deque(texts)
    while left:
        some = [left.popleft()]
        longest = len(texts[some[0]])
        while left and (len(some) + 1) * max(longest, len(texts[left[0]])) <= MOST_READ:
            some.append(left.popleft())
            longest = max(longest, len(texts[some[-1]]))
        ids, _ = pad([texts[row] for row in some], side="right")
        hidden = rows.read(ids, [start[row] for row in some], some)
        for row, states in zip(some, hidden, strict=True):
            yield row, states[: len(texts[row])]


class _Draw:
    """One token of each row of logits [B, V], drawn as transformers draws it."""

    def __init__(self, sampling: Sampling) -> None:
        self.changes = LogitsProcessorList()
        if sampling.temperature != 1.0:
            self.changes.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1.0:
            self.changes.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, logits: Tensor) -> Tensor:
        no_ids: Any = torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
        changed: Any = self.changes(no_ids, logits)
        return torch.multinomial(changed.softmax(dim=-1), 1)[:, 0]
