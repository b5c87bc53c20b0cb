"""A prefix in 8 bits, or in the host's memory, is read as in the model's own form."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from toy import ARCHITECTURES, PER_LAYER, SINKS, VOCAB, WINDOW, make_model

from softprompt_fast.base_model import held_prefix, prefix_cache
from softprompt_fast.base_model.held_prefix import (
    CHANNELS_OF_A_TOKEN,
    GROUP,
    TOKENS_OF_A_CHANNEL,
    HeldTensor,
    PrefixForm,
)
from softprompt_fast.base_model.prefix_cache import Prefix
from softprompt_fast.base_model.shared_prefix import Rows

# Full attention, grouped heads, two kinds of windows, sinks, layers without keys of their own.
SHARING = [name for name in (ARCHITECTURES | PER_LAYER | SINKS) if name != "falcon_h1"]
INT8 = PrefixForm(dtype="int8")
ON_HOST = PrefixForm(device="cpu")
BOTH = PrefixForm(dtype="int8", device="cpu")


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def random_ids(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, size, generator=torch.Generator().manual_seed(seed))


def states_behind(model, prefix: Prefix) -> torch.Tensor:
    rows = Rows(model, prefix, num_rows=3, capacity=9)
    own = random_ids(3, 9, seed=1)
    return torch.cat(
        [rows.read(own[:, :5], [0] * 3, range(3)), rows.read(own[:, 5:], [5] * 3, range(3))], 1
    )


def tensors_of(value, seen: set[int] | None = None) -> list[torch.Tensor]:
    """All that a cache keeps alive."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value if isinstance(value, (list, tuple)) else getattr(value, "__dict__", {}).values()
    return [tensor for part in parts for tensor in tensors_of(part, seen)]


def nbytes(prefix: Prefix) -> int:
    storages = (tensor.untyped_storage() for tensor in tensors_of(prefix.cache))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("axis", [TOKENS_OF_A_CHANNEL, CHANNELS_OF_A_TOKEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parts", [[1], [GROUP], [2 * GROUP, GROUP, 5], [GROUP + 9]], ids=str)
def test_a_number_is_off_by_half_a_step_of_its_range(parts, dtype, axis):
    numbers = (random(1, 2, sum(parts), 8) + 20).to(dtype)
    held = HeldTensor(numbers, sum(parts), INT8, axis)
    for part in numbers.split(parts, dim=2):
        held.append(part)
    got = held.opened()
    assert got.dtype == dtype and got.shape == numbers.shape
    for group, opened in zip(numbers.split(GROUP, 2), got.split(GROUP, 2), strict=True):
        low, high = group.double().aminmax(dim=axis - 1, keepdim=True)
        rounding = torch.finfo(dtype).eps * group.double().abs()
        assert ((opened.double() - group.double()).abs() <= (high - low) / 509 + rounding).all()


def test_numbers_that_are_all_the_same_stay_so():
    same = torch.full((1, 2, 5, 8), 3.0)
    same[:, 1] = 0
    held = HeldTensor(same, 5, INT8, TOKENS_OF_A_CHANNEL)
    held.append(same)
    assert torch.equal(held.opened(), same)


def test_a_channel_with_a_bias_costs_the_others_nothing():
    """Qwen2.5 adds some hundreds to a few channels of its keys."""
    keys = random(1, 2, 300, 8)
    biased = keys.clone()
    biased[..., 3] += 500
    got = []
    for numbers in (keys, biased):
        held = HeldTensor(numbers, 300, INT8, TOKENS_OF_A_CHANNEL)
        held.append(numbers)
        got.append(held.opened() - numbers)
    assert got[1].abs().max() < 2 * got[0].abs().max()


@pytest.mark.parametrize("form", [ON_HOST, BOTH], ids=str)
def test_the_host_holds_what_the_device_is_given(form):
    """The device "meta" stands in for a GPU."""
    held = HeldTensor(torch.empty(1, 2, 7, 8, device="meta"), 200, form, CHANNELS_OF_A_TOKEN)
    held.filled = 150
    places = [part.device.type for part in (held.numbers, held.ranges) if part is not None]
    assert set(places) == {"cpu"}
    assert held.opened().device.type == "meta"
    assert held.opened().shape == (1, 2, 150, 8)


@pytest.mark.parametrize("architecture", SHARING)
@pytest.mark.parametrize("length", [3, WINDOW - 1, 3 * WINDOW], ids="S{}".format)
@torch.no_grad()
def test_rows_behind_a_held_prefix(architecture, length, monkeypatch):
    """In 8 bits close to the model's own form, on the host equal, and both equal to 8 bits."""
    monkeypatch.setattr(held_prefix, "GROUP", 8)
    monkeypatch.setattr(prefix_cache, "PIECE", 16)
    model = make_model(architecture)
    ids = random_ids(length).tolist()
    own, on_host, int8, both = (
        states_behind(model, Prefix.read(model, ids, form))
        for form in (PrefixForm(), ON_HOST, INT8, BOTH)
    )
    assert torch.equal(on_host, own)
    assert torch.equal(both, int8)
    assert 0 < (int8 - own).norm() <= 0.05 * own.norm()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral"])
@torch.no_grad()
def test_8_bits_take_a_quarter_of_fp32(architecture):
    """Three eighths at most: ranges are 8 bytes for 128 tokens, or for the channels of a token."""
    model = make_model(architecture, head_dim=64)
    ids = random_ids(500).tolist()
    own, held = (nbytes(Prefix.read(model, ids, form)) for form in (PrefixForm(), INT8))
    windows = Prefix.read(model, ids, INT8).windows
    tokens = [min(500, window - 1) for window in windows]
    assert own >= sum(2 * 4 * 2 * 64 * n for n in tokens)
    groups = sum(-(-n // GROUP) * GROUP for n in tokens)
    assert held <= 1.15 * 2 * 2 * 64 * groups


@pytest.mark.parametrize("form", [INT8, BOTH], ids=str)
@torch.no_grad()
def test_one_layer_is_open_at_a_time(form, monkeypatch):
    model = make_model(num_hidden_layers=5)
    opened, alive, open_one = [], [], HeldTensor.opened

    def watch(held):
        gc.collect()
        alive.append(sum(reference() is not None for reference in opened))
        tensor = open_one(held)
        opened.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(HeldTensor, "opened", watch)
    prefix = Prefix.read(model, random_ids(1500).tolist(), form)
    states_behind(model, prefix)
    assert len(opened) == 2 * 5 * (2 + 2)  # two further pieces, two calls of the rows
    assert max(alive) <= 3  # keys and values of a layer, and keys of the next


@torch.no_grad()
def test_no_call_reads_more_than_a_piece_into_another_form():
    """So the model's own form of the whole prefix is never in memory."""
    model = make_model()
    lengths = []
    append = HeldTensor.append

    def watch(held, new):
        lengths.append(new.shape[2])
        append(held, new)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldTensor, "append", watch)
        Prefix.read(model, random_ids(3 * prefix_cache.PIECE + 5).tolist(), INT8)
    assert lengths == [prefix_cache.PIECE] * 3 * 4 + [5] * 4


def test_pieces_are_whole_groups():
    assert prefix_cache.PIECE % GROUP == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="int4"), "prefix_dtype must be one of auto, int8: got 'int4'"),
        (dict(device="disk"), "prefix_device must be one of auto, cpu: got 'disk'"),
    ],
    ids=str,
)
def test_an_unknown_form_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        PrefixForm(**options)
