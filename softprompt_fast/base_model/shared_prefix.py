"""Rows of tokens that go on from one prefix, whose keys and values are held once and never copied.

The queries of all rows attend to the prefix in one product, as if they were one row's, and each to
the tokens of its own row in another. Two softmaxes over parts are one over all, by their logsumexp:

    attention(q, prefix + own) = w attention(q, prefix) + (1 - w) attention(q, own)
    w = sigmoid(logsumexp(q K_prefix) - logsumexp(q K_own))

as in Hydragen (Juravsky et al., 2024) and in cascade attention.

Legend: B rows of a call, n tokens of each, H heads of queries, K of keys, G = H / K, d width of a
head, S tokens of the prefix, m slots of a row in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from .checks import some_ids
from .held_prefix import keys_and_values
from .output_head import hidden_states
from .prefix_cache import SLOT_COUNTING_MODELS, Prefix

NAME = "softprompt_fast_shared_prefix"

# Scores that are written at once where no kernel of PyTorch's returns the logsumexp.
SCORES = 1 << 24

# Of a GPU; PyTorch's context parallelism joins what it returns by the same formula.
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention


class Rows:
    """A prefix and up to ``num_rows`` rows that go on from it, each in slots of its own."""

    def __init__(
        self, model: PreTrainedModel, prefix: Prefix, *, num_rows: int, capacity: int
    ) -> None:
        """capacity: tokens of the longest row, without the prefix."""
        assert prefix.windows is not None
        self.model, self.prefix = model, prefix
        self.size = num_rows, capacity
        owned = [None] * len(prefix.windows) if prefix.cache is None else prefix.cache.layers
        self.cache = DynamicCache()
        self.cache.layers = [
            RowLayer(self, shared, window)
            for shared, window in zip(owned, prefix.windows, strict=True)
        ]
        configs = (getattr(module, "config", None) for module in model.modules())
        known = {id(config): config for config in configs}
        self._configs: list[Any] = [
            config for config in known.values() if hasattr(config, "_attn_implementation")
        ]
        self.filled = 0
        self.rows: Tensor | slice = slice(None)
        self.slots = torch.zeros(0, 0, dtype=torch.long)
        self._masks: dict[Any, Tensor | None] = {}

    def read(self, ids: Tensor, start: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Hidden states [B, n, D] of the next tokens of some rows.

        ids: [B, n]; row ``rows[i]`` has read ``start[i]`` tokens. What it reads beyond its end, as
        padding, it forgets when it goes on from there.
        """
        n = ids.shape[1]
        device = self.prefix.ids.device
        ids = ids.to(device)
        first = torch.tensor(start, device=device)
        self.slots = first[:, None] + torch.arange(n, device=device)
        every = list(rows) == list(range(self.size[0]))
        self.rows = slice(None) if every else torch.tensor(rows, device=device)
        self.filled = max(start) + n
        self._masks = {}
        with self._attention():
            return hidden_states(
                self.model,
                input_ids=ids,
                position_ids=self.prefix.length + self.slots,
                past_key_values=self.cache,
                use_cache=True,
            )

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """The model calls ``shared_prefix_attention``, and makes no mask."""
        before = [(config, config._attn_implementation) for config in self._configs]
        try:
            for config, _ in before:
                config._attn_implementation = NAME
            yield
        finally:
            # a model's own config comes before those that it hands its parts
            for config, name in before:
                config._attn_implementation = name

    def own_mask(self, window: float, groups: int, dtype: torch.dtype) -> Tensor:
        """Of the tokens of each row, [B, 1, G n, m]: 0 where a token sees another, else -inf."""
        key = "own", window, groups
        if key not in self._masks:
            keys = torch.arange(self.filled, device=self.slots.device)
            self._masks[key] = _mask(self.slots, keys, window, dtype).repeat(1, groups, 1)[:, None]
        mask = self._masks[key]
        assert mask is not None
        return mask

    def prefix_mask(
        self, length: int, window: float, groups: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Of the last ``length`` tokens of the prefix, [1, 1, B G n, length]; None: all is seen."""
        if length + self.filled <= window:
            return None
        key = "prefix", length, window, groups
        if key not in self._masks:
            keys = torch.arange(-length, 0, device=self.slots.device)
            mask = _mask(self.slots, keys, window, dtype).repeat(1, groups, 1)
            self._masks[key] = mask.flatten(0, 1)[None, None]
        return self._masks[key]


class RowLayer(DynamicLayer):
    """Keys and values of one layer: the prefix's, and those of the rows' slots."""

    def __init__(self, owner: Rows, shared: Any, window: float) -> None:
        super().__init__()
        self.owner, self.window = owner, window
        is_read = shared is not None and shared.is_initialized
        self.shared = shared if is_read else None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any):
        owner = self.owner
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            num_rows, capacity = owner.size
            self.keys, self.values = (
                new.new_zeros(num_rows, new.shape[1], capacity, new.shape[3])
                for new in (key_states, value_states)
            )
        known: list[Any] = []
        pairs: Any = ((self.keys, key_states), (self.values, value_states))
        for held, new in pairs:
            rows = owner.rows
            index = torch.arange(len(held), device=new.device) if isinstance(rows, slice) else rows
            held[index[:, None], :, owner.slots] = new.transpose(1, 2)
            known.append(held[rows, :, : owner.filled])
        known[0].layer = self  # for shared_prefix_attention
        return tuple(known)

    def get_seq_length(self) -> int:
        return self.owner.prefix.length + int(self.owner.slots[0, 0])


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """In the form of transformers' attention functions.

    query: [B, H, n, d]; key, value: [B, K, m, d] as ``RowLayer.update`` gave them.
    softcap, s_aux: of Gemma 2, and of GPT-OSS: logits [H] beside those of the keys.
    """
    layer = getattr(key, "layer", None)
    if layer is None or attention_mask is not None or dropout:
        raise NotShared("it changes the keys, or makes a mask of its own")
    if layer.window != (math.inf if sliding_window is None else sliding_window):
        raise NotShared("it keeps another window of keys than it sees")
    owner: Rows = layer.owner
    B, H, n, d = query.shape
    K = key.shape[1]
    G = H // K
    scale = d**-0.5 if scaling is None else scaling
    grouped = query.reshape(B, K, G * n, d)
    own_mask = owner.own_mask(layer.window, G, query.dtype)
    out, lse = attention(grouped, key, value, own_mask, scale, softcap)
    if layer.shared is not None:
        keys, values = keys_and_values(layer.shared)
        asked = grouped.transpose(0, 1).reshape(1, K, B * G * n, d)
        mask = owner.prefix_mask(keys.shape[2], layer.window, G, query.dtype)
        shared, shared_lse = attention(asked, keys, values, mask, scale, softcap)
        if mask is not None:  # a query that sees none of it: PyTorch's kernel says 0
            shared_lse = shared_lse.masked_fill(mask.isneginf().all(dim=-1), -math.inf)
        shared = shared.view(K, B, G * n, -1).transpose(0, 1)
        shared_lse = shared_lse.view(K, B, G * n).transpose(0, 1)
        weight = (shared_lse - lse).sigmoid()[..., None]
        # where a window has left the prefix behind, its part is no number
        out = torch.where(weight > 0, weight * shared + (1 - weight) * out, out)
        lse = torch.logaddexp(lse, shared_lse)
    out = out.reshape(B, H, n, -1)
    if s_aux is not None:
        sink = s_aux.float().view(1, H, 1)
        out = out * (lse.reshape(B, H, n) - sink).sigmoid()[..., None]
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, shared_prefix_attention)


class NotShared(ValueError):
    """Why a model cannot go on from a shared prefix."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v, and the logsumexp of each query in fp32.

    query: [B, K, L, d]; key, value: [B, K, m, d]; mask: what broadcasts to [B, K, L, m].
    softcap: the logits are softcap * tanh(logits / softcap), before the mask.
    """
    fits = softcap is None and key.shape[-1] == value.shape[-1]
    if fits and query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=scale
        )
    if fits and mask is None and _suits_flash_attention(query, key, value):
        return flash_attention(query, key, value, scale=scale)[:2]
    rows = max(1, SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    parts = []
    for start in range(0, query.shape[2], rows):
        z = (query[:, :, start : start + rows] @ key.transpose(2, 3)).float() * scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        if mask is not None:
            z = z + (mask if mask.shape[2] == 1 else mask[:, :, start : start + rows])
        lse = z.logsumexp(-1)
        parts.append(((z - lse[..., None]).exp().to(value.dtype) @ value, lse))
    out, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return out, lse


def _suits_flash_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel of a GPU takes them. It divides a long prefix among the multiprocessors,
    however few the queries are. What has a mask is short: the tokens of a row, or a window."""
    if query.device.type != "cuda" or query.shape[-1] % 8:
        return False
    params = SDPAParams(query, key, value, None, 0.0, False, False)
    return can_use_flash_attention(params)


def why_not_shared(model: PreTrainedModel, prefix: Prefix) -> str | None:
    """What keeps this model's rows from going on from one prefix; None where nothing does.

    A few tokens tell: read by themselves, and in rows behind some of them.
    """
    if prefix.windows is None:
        return "it keeps more than keys and values"
    config = model.config.get_text_config(decoder=True)
    if not model.is_backend_compatible() or config.model_type in SLOT_COUNTING_MODELS:
        return "its attention is its own"
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return "its attention is cut into chunks"
    ids = some_ids(model)
    behind, (one, other) = ids[0, :3], (ids[0, 3:7], ids[0, 6:])
    try:
        rows = Rows(model, Prefix.read(model, behind.tolist()), num_rows=3, capacity=4)
        first = rows.read(torch.stack([one[:2], other]), [0, 0], [0, 2])
        then = rows.read(torch.stack([one[2:], other[:1].expand(2)]), [2, 1], [0, 2])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return str(error).split("\n")[0] or type(error).__name__
    for got, tokens in (
        (torch.cat([first[0], then[0]]), one),
        (torch.cat([first[1, :1], then[1]]), other[:1].expand(3)),
    ):
        alone = torch.cat([behind, tokens])[None]
        expected = hidden_states(model, input_ids=alone, use_cache=False)[0, len(behind) :].float()
        relative = max(1e-3, 8 * torch.finfo(model.dtype).eps)
        if not (got.float() - expected).norm() <= relative * expected.norm():
            return "it reads them otherwise"
    return None


def _mask(slots: Tensor, keys: Tensor, window: float, dtype: torch.dtype) -> Tensor:
    """[B, n, keys]: a token sees itself and what is less than ``window`` before it."""
    distance = slots[..., None] - keys
    seen = distance >= 0 if window == math.inf else (distance >= 0) & (distance < window)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, -math.inf)
