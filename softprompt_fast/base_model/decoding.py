"""The tokens that a model writes by itself: its most probable ones, or a plain draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import GenerationConfig

from ..data.queries import turn_end
from .checks import position_switch
from .virtual_tokens import read_as


@dataclass(kw_only=True, frozen=True)
class Sampling:
    """How tokens are drawn; by default a plain draw from the model's distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Only the most probable tokens, as many as have this share of the probability."""

    def options(self) -> dict[str, Any]:
        # transformers' own default is to draw from the 50 most probable tokens.
        return {"do_sample": True, "top_k": 0, **asdict(self)}


PLAIN = Sampling()


@torch.no_grad()
def write(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    do_sample: bool = False,
    sampling: Sampling = PLAIN,
    past_key_values: Any = None,
    embeds: Tensor | None = None,
    streamer: Any = None,
) -> list[list[int]]:
    """What the model writes after each row, up to and with the first of ``end_ids``.

    ids, mask: [B, L], each row complete at its right end; the first ids are those that
    ``past_key_values`` holds. embeds: [B, L, D], read in the place of the embeddings of ``ids``.
    streamer: as in transformers; of one row it gets ``ids``, then each token as it is written.
    """
    keeps_keys = _keeps_keys(model, int(mask.sum(dim=1).max()), max_new_tokens)
    with _without_own_defaults(model), read_as(model, embeds, in_all_calls=not keeps_keys):
        written = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=past_key_values,
            use_cache=keeps_keys,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(end_ids) or None,
            pad_token_id=end_ids[0] if end_ids else 0,
            streamer=streamer,
            **(sampling.options() if do_sample else {"do_sample": False}),
        )
    return [_until_end(row, end_ids) for row in written[:, ids.shape[1] :].tolist()]


def pad(rows: Sequence[list[int]], *, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, L]; the ids of the padding are 0."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        where = slice(length - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, where] = torch.tensor(tokens)
        mask[row, where] = 1
    return ids, mask


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The token ids at which the model ends its answer: whoever names one is believed.

    In the order of generation config, config, tokenizer and chat template.
    """
    configs = (getattr(model, name, None) for name in ("generation_config", "config"))
    named = [getattr(config, "eos_token_id", None) for config in configs]
    named += [tokenizer.eos_token_id, turn_end(tokenizer)]
    ids = (ids if isinstance(ids, (list, tuple)) else [ids] for ids in named)
    return list(dict.fromkeys(one for several in ids for one in several if one is not None))


def in_batches(
    indices: Sequence[int],
    size: int,
    *,
    length: Callable[[int], int],
    may_pad: bool,
    switch: float = math.inf,
    more: int = 0,
) -> Iterator[list[int]]:
    """``indices`` in parts of at most ``size``.

    Rows of about the same length share a part, so that little of it is padding; rows of exactly the
    same length where the model bears no padding.
    switch: the model's ``position_switch``: no part has rows on both sides, and rows that pass it
    with the ``more`` tokens that are to be written have the same length.
    """

    def alike(index: int) -> tuple[bool, int]:
        tokens = length(index)
        is_alone = not may_pad or tokens <= switch < tokens + more
        return is_alone, tokens if is_alone else int(tokens > switch)

    for _, group in groupby(sorted(indices, key=length), key=alike):
        rows = list(group)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _keeps_keys(model: Any, longest: int, max_new_tokens: int) -> bool:
    """Whether the keys of rows that grow from ``longest`` tokens stay right."""
    switch = position_switch(model)
    if longest > switch:
        # transformers 5.3 forgets Phi-3's keys there, after the first token.
        return Version(transformers.__version__) >= Version("5.4")
    return longest + max_new_tokens <= switch


@contextmanager
def _without_own_defaults(model: Any) -> Iterator[None]:
    """``generate`` as if the checkpoint came without a generation_config.

    What is not said in the call is filled in from there: penalties, suppressed tokens, no cache.
    Passing a generation_config of our own would not help, its empty fields are filled as well.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Up to and with the first end-of-sequence token; the rest of a row is padding."""
    ends = [position for position, token in enumerate(ids) if token in end_ids]
    return ids[: ends[0] + 1] if ends else ids
