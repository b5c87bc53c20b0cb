"""Keys and values of a token prefix that many queries share: read once, lent to each batch."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .checks import position_switch
from .held_prefix import AS_READ, HeldLayer, PrefixForm, hold
from .output_head import decoder

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

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    @classmethod
    def read(cls, model: PreTrainedModel, ids: Sequence[int], form: PrefixForm = AS_READ) -> Prefix:
        """In pieces of ``PIECE`` tokens, so that no more memory is needed beside keys and values
        than one piece takes, however long the prefix is. They go into ``form`` piece by piece."""
        tensor = torch.tensor([list(ids)], dtype=torch.long, device=model.device)
        # What kind of state the model keeps shows on any token, also where there is none to read.
        read = tensor if ids else tensor.new_zeros(1, 1)
        switch = position_switch(model)
        piece = PIECE if read.shape[1] <= switch else read.shape[1]
        cache: Any = None
        for start in range(0, read.shape[1], piece):
            output = decoder(model)(
                input_ids=read[:, start : start + piece],
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
            # Mamba and RWKV call their state by other names.
            cache = getattr(output, "past_key_values", None)
            only_keys_and_values = type(cache) is DynamicCache and all(
                type(layer) in PLAIN_LAYERS for layer in cache.layers
            )
            if not only_keys_and_values:  # then each batch reads the prefix anew
                break
            hold(cache, read.shape[1], form, is_read=start + piece >= read.shape[1])
        windows = None
        if only_keys_and_values:
            windows = tuple(getattr(layer, "sliding_window", math.inf) for layer in cache.layers)
        counts_slots = model.config.get_text_config(decoder=True).model_type in SLOT_COUNTING_MODELS
        return cls(
            ids=tensor,
            cache=cache if ids and only_keys_and_values else None,
            windows=windows,
            bears_padding=windows is not None,
            window=0 if windows is None or counts_slots else min(windows, default=math.inf),
            switch=switch,
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
