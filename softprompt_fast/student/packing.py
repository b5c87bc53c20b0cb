"""Packing: several sequences in one row, behind one copy of the soft prompt that they share.

A row of segments; a token sees what precedes it in its own segment and in the shared one::

    segment_ids    0  0  0  0   1  1  1   2  2  2  2   3  3   -1
    tokens         <  before >  < one >   <  other  >  <  >   padding
                     + sigma

Positions count on from the shared segment in each of the others, so that every token has the keys,
values and position of the plain layout: one sequence a row, each with a prompt of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base_model.checks import position_switch, some_ids
from ..base_model.output_head import hidden_states
from ..base_model.prefix_cache import Prefix

SHARED, PADDING = 0, -1

# They take a mask of their caller's own, [B, 1, L, L].
MASKED_ATTENTION = ("sdpa", "eager")


def pack(lengths: Sequence[int], opening: int, width: int) -> list[list[int]]:
    """Sequences of ``lengths``, by their index, in the rows that cost least.

    opening: tokens that every row starts with. width: D of the model.
    Each row takes the longest sequence that is left, in turn, where there is most room.

    Padded to the longest row, R rows of L tokens cost about ``R L (3 D + L)``: for each token, a
    layer's weights do about 24 D^2 operations, and attention to the whole row 4 D L at half the
    speed.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])

    def split(num_rows: int) -> tuple[int, list[list[int]]]:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        taken = [opening] * num_rows
        for index in longest_first:
            row = taken.index(min(taken))
            rows[row].append(index)
            taken[row] += lengths[index]
        return num_rows * max(taken) * (3 * width + max(taken)), rows

    return min(map(split, range(1, len(lengths) + 1)), key=lambda found: found[0])[1]


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Which tokens a token sees, [R, 1, L, L], from [R, L]."""
    own = segment_ids[:, :, None] == segment_ids[:, None, :]
    shared = segment_ids[:, None, :] == SHARED
    return (own | shared).tril()[:, None]


def attention_mask(model: PreTrainedModel, segment_ids: Tensor) -> Tensor:
    """``segment_mask`` in the form that the model's attention takes."""
    mask = segment_mask(segment_ids)
    if model.config._attn_implementation == "sdpa":
        return mask
    blocked = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
    return blocked.masked_fill(~mask, torch.finfo(model.dtype).min)


@torch.no_grad()
def longest_packed(model: PreTrainedModel) -> float:
    """The longest sequence, prompt included, that the model reads in a packed row as by itself.

    0: it reads none so. Its attention takes no mask but its own, or counts slots where others count
    positions, or it keeps a state that runs on from one sequence into the next.
    """
    if model.config._attn_implementation not in MASKED_ATTENTION:
        return 0
    if not model.is_backend_compatible():
        return 0
    prefix = Prefix.read(model, [])
    if not (prefix.bears_padding and _reads_packed(model)):
        return 0
    return min(prefix.window, position_switch(model))


def _reads_packed(model: PreTrainedModel) -> bool:
    """Whether a few tokens in a packed row have the hidden states that they have by themselves."""
    ids = some_ids(model)
    first, other = ids[:, :5], torch.cat([ids[:, :2], ids[:, 5:]], dim=1)
    plain = [
        hidden_states(model, input_ids=alone, use_cache=False)[:, 2:] for alone in (first, other)
    ]
    packed = hidden_states(
        model,
        input_ids=ids,
        attention_mask=attention_mask(model, ids.new_tensor([[0, 0, 1, 1, 1, 2, 2, 2]])),
        position_ids=ids.new_tensor([[0, 1, 2, 3, 4, 2, 3, 4]]),
        use_cache=False,
    )[:, 2:]
    expected = torch.cat(plain, dim=1).float()
    relative = max(1e-3, 8 * torch.finfo(model.dtype).eps)
    return bool((packed.float() - expected).norm() <= relative * expected.norm())
