"""Keys and values of a token prefix that many queries share: read once, lent to each batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .checks import position_switch
from .held_prefix import AS_READ, HeldLayer, PrefixForm, hold
from .output_head import decoder
from .virtual_tokens import read_as

# Layers that hold nothing but keys and values.
PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, HeldLayer)

# Tokens of a prefix that are read at once.
PIECE = 512

# Their attention counts slots where others count positions: ALiBi in MPT, local layers in GPT Neo.
SLOT_COUNTING_MODELS = ("mpt", "gpt_neo")


@dataclass(kw_only=True, frozen=True, eq=False)
class Prefix:
    """The tokens that a group of queries shares, with their keys and values."""

    ids: Tensor
    """[1, S]."""

    cache: DynamicCache | None
    """Never written to: ``cache_for`` hands out copies. None where S = 0, and where the model
    keeps more than keys and values (a recurrent state): then each batch reads the prefix anew."""

    bears_padding: bool
    """Whether masked tokens before a row leave its answer as it is: not in a recurrent state."""

    windows: tuple[float, ...] | None
    """How far each layer sees, in tokens; None where the model keeps more than keys and values."""

    window: float
    """The shortest row from which masked tokens in its middle push others out of sight."""

    switch: float
    """The model's ``position_switch``."""

    token_bytes: int
    """Of the keys and values of a token as the model computes them; 0 where it keeps more."""

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @classmethod
    def read(
        cls,
        model: PreTrainedModel,
        ids: Sequence[int],
        form: PrefixForm = AS_READ,
        *,
        embeds: Tensor | None = None,
    ) -> Prefix:
        """In pieces, so that no more memory is needed beside keys and values than one of them
        takes, however long the prefix is. They go into ``form`` piece by piece.

        embeds: [1, S, D], read in the place of the embeddings of ``ids``.
        """
        tensor = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
        # What kind of state the model keeps shows on any token, also where there is none to read.
        read = tensor if ids else tensor.new_zeros(1, 1)
        windows = None
        cache: Any = None
        token_bytes = is_read = 0
        for hidden, cache in read_in_pieces(model, read, embeds):
            windows = kept_windows(cache)
            if windows is None:  # then each batch reads the prefix anew
                break
            is_read += hidden.shape[1]
            token_bytes = token_bytes or _token_bytes(cache)
            hold(cache, read.shape[1], form, is_read=is_read == read.shape[1])
        counts_slots = model.config.get_text_config(decoder=True).model_type in SLOT_COUNTING_MODELS
        return cls(
            ids=tensor,
            cache=cache if ids and windows is not None else None,
            windows=windows,
            bears_padding=windows is not None,
            window=0 if windows is None or counts_slots else min(windows, default=math.inf),
            switch=position_switch(model),
            token_bytes=token_bytes,
        )

    def cache_for(self, batch_size: int, longest: int) -> DynamicCache | None:
        """The cache for a batch, which may grow up to ``longest`` tokens without changing this one;
        None where there is none, and where the model turns the keys of such a call otherwise.

        Its layers only ever replace their keys and values by longer tensors, so the copy starts as
        a view of this one's memory, ``batch_size`` times.
        """
        if self.cache is None or self.length <= self.switch < longest:
            return None
        cache = copy.copy(self.cache)
        layers: list[Any] = [
            layer.as_read() if isinstance(layer, HeldLayer) else copy.copy(layer)
            for layer in self.cache.layers
        ]
        cache.layers = layers
        for layer in layers:
            if layer.is_initialized:
                layer.keys = layer.keys.expand(batch_size, -1, -1, -1)
                layer.values = layer.values.expand(batch_size, -1, -1, -1)
        return cache

    def allows_gap(self, num_more: int) -> bool:
        """Whether ``num_more`` tokens may follow with masked padding between prefix and query.

        Full attention ignores masked slots. A sliding window counts them, unless nothing ever
        leaves it; a recurrent state is changed by them, wherever they are.
        """
        return self.bears_padding and (self.length == 0 or self.length + num_more < self.window)


def read_in_pieces(
    model: PreTrainedModel, ids: Tensor, embeds: Tensor | None = None
) -> Iterator[tuple[Tensor, Any]]:
    """``PIECE`` after ``PIECE`` of the tokens [1, S]: its hidden states [1, n, D], and what the
    model keeps of all that it has read, which is right if it is keys and values alone."""
    length = ids.shape[1]
    piece = PIECE if length <= position_switch(model) else length
    cache: Any = None
    for start in range(0, length, piece):
        here = slice(start, start + piece)
        with read_as(model, None if embeds is None else embeds[:, here]):
            output = decoder(model)(
                input_ids=ids[:, here], past_key_values=cache, use_cache=True, return_dict=True
            )
        # Mamba and RWKV call their state by other names.
        cache = getattr(output, "past_key_values", None)
        yield output.last_hidden_state, cache


def kept_windows(cache: Any) -> tuple[float, ...] | None:
    """How far each layer sees, in tokens; None if the model keeps more than keys and values."""
    if type(cache) is not DynamicCache:
        return None
    if any(type(layer) not in PLAIN_LAYERS for layer in cache.layers):
        return None
    return tuple(getattr(layer, "sliding_window", math.inf) for layer in cache.layers)


def _token_bytes(cache: DynamicCache) -> int:
    layers: list[Any] = cache.layers
    read = [layer for layer in layers if layer.is_initialized]
    return sum(held[:, :, :1].nbytes for layer in read for held in (layer.keys, layer.values))
