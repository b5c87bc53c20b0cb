"""Keys and values of a prefix in another form: in 8 bits, in the host's memory, or both.

They come back to the model's dtype and device a layer at a time, while the layer is attended to.

Legend: K heads of keys, S tokens, d width of a head, g tokens of a group.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache, DynamicLayer

PrefixDtype = Literal["auto", "int8"]
PrefixDevice = Literal["auto", "cpu"]

# Tokens that share the ranges of their channels. It divides the tokens that are read at once.
GROUP = 128

# Of the groups [1, K, S / g, g, d], the axis that shares a range. Channels of keys differ more than
# tokens do; with values it is the other way round. Along the other axis the KL on SmolLM2-135M is 3
# times as large for keys, 1000 times with a bias of 100 (Qwen2.5 has such), 17 times for values.
TOKENS_OF_A_CHANNEL, CHANNELS_OF_A_TOKEN = 3, 4


@dataclass(kw_only=True, frozen=True)
class PrefixForm:
    """How the keys and values of a prefix are held."""

    dtype: PrefixDtype = "auto"
    """auto: the model's own."""

    device: PrefixDevice = "auto"
    """auto: the model's own."""

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", get_args(PrefixDtype)), ("device", get_args(PrefixDevice))):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"prefix_{name} must be one of {', '.join(allowed)}: got {value!r}."
                )


AS_READ = PrefixForm()


class HeldTensor:
    """Numbers [1, K, S, d], which come one part after another.

    In 8 bits: number = low + step * byte, where low and step make 0 and 255 the ends of a range.
    """

    def __init__(self, like: Tensor, num_tokens: int, form: PrefixForm, shares_range: int) -> None:
        """like: [1, K, any, d]. shares_range: an axis of the groups."""
        self.dtype, self.device = like.dtype, like.device
        self.shares_range = shares_range
        self.filled = 0
        place: dict[str, Any] = {"device": like.device}
        if form.device == "cpu":
            place = {"device": "cpu", "pin_memory": like.device.type == "cuda"}
        groups = [1, like.shape[1], -(-num_tokens // GROUP), GROUP, like.shape[3]]
        is_int8 = form.dtype == "int8"
        self.numbers = torch.empty(groups, dtype=torch.uint8 if is_int8 else like.dtype, **place)
        groups[shares_range] = 1
        # low and step, in one tensor for one copy
        self.ranges = torch.empty(2, *groups, dtype=torch.float32, **place) if is_int8 else None

    def append(self, new: Tensor) -> None:
        """new: [1, K, n, d]. All parts but the last are whole groups."""
        n = new.shape[2]
        assert self.filled % GROUP == 0
        groups = pad(new, (0, 0, 0, -n % GROUP), mode="replicate").unflatten(2, (-1, GROUP))
        first = self.filled // GROUP
        where = slice(first, first + groups.shape[2])
        if self.ranges is not None:
            low, high = (end.float() for end in groups.aminmax(dim=self.shares_range, keepdim=True))
            step = ((high - low) / 255).clamp(min=torch.finfo(torch.float32).tiny)
            self.ranges[:, :, :, where] = torch.stack([low, step])
            groups = ((groups - low) / step).round()
        self.numbers[:, :, where] = groups.to(self.numbers.dtype)
        self.filled += n

    def opened(self) -> Tensor:
        """What is known of them, [1, K, filled, d], in the model's dtype on its device."""
        known = slice(-(-self.filled // GROUP))
        numbers = self.numbers[:, :, known].to(self.device, non_blocking=True)
        if self.ranges is not None:
            low, step = self.ranges[:, :, :, known].to(self.device, non_blocking=True)
            # computed in fp32, but not written
            out = torch.empty(numbers.shape, dtype=self.dtype, device=self.device)
            numbers = torch.addcmul(low, numbers, step, out=out)
        return numbers.flatten(2, 3)[:, :, : self.filled]


class HeldLayer(DynamicLayer):
    """A layer of a prefix, in the form asked for from its first tokens on."""

    def __init__(self, first: DynamicLayer, num_tokens: int, form: PrefixForm) -> None:
        """first: what has been read of the ``num_tokens`` that the layer will hold."""
        super().__init__()
        self.sliding_window = getattr(first, "sliding_window", math.inf)
        self._as_read = copy.copy(first)
        self._as_read.keys = self._as_read.values = None
        states: Any = (first.keys, first.values)
        self.lazy_initialization(*states)
        self.held = [
            HeldTensor(like, num_tokens, form, axis)
            for like, axis in zip(states, (TOKENS_OF_A_CHANNEL, CHANNELS_OF_A_TOKEN), strict=True)
        ]
        self._append(*states)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any):
        self._append(key_states, value_states)
        return self.opened()

    def get_seq_length(self) -> int:
        return self.held[0].filled

    def opened(self) -> tuple[Tensor, Tensor]:
        keys, values = self.held
        return keys.opened(), values.opened()

    def as_read(self) -> DynamicLayer:
        """The layer as the model keeps it."""
        layer = copy.copy(self._as_read)
        layer.keys, layer.values = self.opened()
        return layer

    def _append(self, *states: Tensor) -> None:
        for held, new in zip(self.held, states, strict=True):
            held.append(new)


def hold(cache: DynamicCache, num_tokens: int, form: PrefixForm, *, is_read: bool) -> None:
    """Puts the layers of a cache, which is to have ``num_tokens``, into ``form``.

    A layer with a window throws tokens away as it goes on, so it waits until all of them are read.
    """
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        keeps_all = type(layer) is DynamicLayer
        is_plain = not isinstance(layer, HeldLayer)
        if form != AS_READ and layer.is_initialized and is_plain and (keeps_all or is_read):
            most = num_tokens if keeps_all else layer.keys.shape[2]
            layers[index] = HeldLayer(layer, most, form)


def keys_and_values(layer: Any) -> tuple[Tensor, Tensor]:
    """[1, K, S, d] of a layer of a prefix, whatever its form."""
    return layer.opened() if isinstance(layer, HeldLayer) else (layer.keys, layer.values)
