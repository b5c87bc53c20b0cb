"""Rows behind one prefix are read as whole sequences are, and the prefix stays as it was."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from toy import (
    ARCHITECTURES,
    PADDING_SENSITIVE,
    PER_LAYER,
    SIZES,
    SWITCHING,
    VOCAB,
    WINDOW,
    make_model,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from softprompt_fast.base_model import prefix_cache, shared_prefix
from softprompt_fast.base_model.checks import check_model
from softprompt_fast.base_model.output_head import hidden_states
from softprompt_fast.base_model.prefix_cache import Prefix
from softprompt_fast.base_model.shared_prefix import Rows, attention, why_not_shared

ROOT = Path(__file__).resolve().parents[2]
SHARING = [name for name in (ARCHITECTURES | PER_LAYER | SWITCHING) if name != "falcon_h1"]


def random_ids(*size: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, size, generator=random)


def states_alone(model, prefix, own) -> torch.Tensor:
    ids = torch.tensor([[*prefix, *own]])
    return hidden_states(model, input_ids=ids, use_cache=False)[0, len(prefix) :]


def assert_close(got: torch.Tensor, expected: torch.Tensor, relative: float = 2e-5) -> None:
    assert got.shape == expected.shape
    distance = (got.double() - expected.double()).norm()
    assert distance <= relative * expected.double().norm()


@pytest.mark.parametrize("architecture", SHARING)
# nothing; a few; more than the window holds, so that rows leave all of it behind
@pytest.mark.parametrize("length", [0, 3, WINDOW - 1, 2 * WINDOW], ids="S{}".format)
@torch.no_grad()
def test_rows_are_read_as_whole_sequences(architecture, length, monkeypatch):
    monkeypatch.setattr(prefix_cache, "PIECE", 16)
    model = make_model(architecture)
    ids = random_ids(length).tolist()
    prefix = Prefix.read(model, ids)
    assert why_not_shared(model, prefix) is None
    if prefix.length <= prefix.switch < length + 40:
        pytest.skip("its keys turn on the way: the teacher does not share them")
    rows = Rows(model, prefix, num_rows=4, capacity=40)
    texts = {row: random_ids(40, seed=row + 1).tolist() for row in range(4)}
    read = {0: 5, 2: 9, 3: 1}  # by row: the first call is ragged and leaves out a row
    ragged = torch.stack([random_ids(9, seed=9) for _ in read])
    for place, (row, n) in enumerate(read.items()):
        ragged[place, :n] = torch.tensor(texts[row][:n])
    got = rows.read(ragged, [0] * 3, list(read))
    found = {row: [got[place, :n]] for place, (row, n) in enumerate(read.items())}
    read[1], found[1] = 0, []
    # in any order, some or all of them, one token or several
    for order, n in (([3, 0], 1), ([0, 1, 2, 3], 2), ([2, 1], 7), ([0, 1, 2, 3], 20)):
        ids_now = torch.tensor([texts[row][read[row] : read[row] + n] for row in order])
        got = rows.read(ids_now, [read[row] for row in order], order)
        for place, row in enumerate(order):
            found[row].append(got[place])
            read[row] += n
    for row, parts in found.items():
        assert_close(torch.cat(parts), states_alone(model, ids, texts[row][: read[row]]))


@torch.no_grad()
def test_attention_sinks_take_their_share():
    model = make_model("gpt_oss")
    for module in model.modules():
        if hasattr(module, "sinks"):
            module.sinks.normal_(std=2.0)
    for length in (3, 2 * WINDOW):
        ids = random_ids(length).tolist()
        rows = Rows(model, Prefix.read(model, ids), num_rows=2, capacity=30)
        own = random_ids(2, 30, seed=1)
        got = rows.read(own, [0, 0], [0, 1])
        for row in range(2):
            assert_close(got[row], states_alone(model, ids, own[row].tolist()))


@pytest.mark.parametrize("architecture", ["falcon_h1", *PADDING_SENSITIVE])
def test_who_cannot_share_says_why(architecture):
    model = make_model(architecture)
    assert why_not_shared(model, Prefix.read(model, [1, 2])) in (
        "it keeps more than keys and values",
        "its attention is its own",
    )


def test_a_model_that_reads_rows_otherwise_is_found_out(monkeypatch):
    """What goes unnoticed here would be wrong in every answer."""
    model = make_model("llama")
    prefix = Prefix.read(model, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "prefix_mask", lambda *_: torch.full((1,), -math.inf))
        assert why_not_shared(model, prefix)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "own_mask", lambda *_: None)
        assert why_not_shared(model, prefix) == "it reads them otherwise"
    assert why_not_shared(model, prefix) is None


@torch.no_grad()
def test_the_prefix_is_held_once_and_never_written_to():
    model = make_model("gemma3")
    prefix = Prefix.read(model, random_ids(30).tolist())
    before = [(layer.keys.clone(), layer.values.clone()) for layer in prefix.cache.layers]
    rows = Rows(model, prefix, num_rows=3, capacity=8)
    rows.read(random_ids(3, 8), [0] * 3, range(3))
    for layer, own, (keys, values) in zip(
        prefix.cache.layers, rows.cache.layers, before, strict=True
    ):
        assert own.shared is layer
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_the_models_own_attention_comes_back():
    model = make_model("llama")
    before = model.config._attn_implementation
    rows = Rows(model, Prefix.read(model, [1, 2]), num_rows=1, capacity=2)
    with pytest.raises(IndexError):
        rows.read(torch.tensor([[VOCAB + 5]]), [0], [0])
    assert model.config._attn_implementation == before
    assert model.model.layers[0].self_attn.config._attn_implementation == before


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value_width", [8, 5])
def test_attention_is_softmax(softcap, masked, value_width, monkeypatch):
    monkeypatch.setattr(shared_prefix, "SCORES", 100)
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, length, width, generator=random)
        for length, width in ((7, 8), (11, 8), (11, value_width))
    )
    mask = None
    if masked:
        seen = torch.rand(2, 1, 7, 11, generator=random) < 0.6
        seen[..., 0] = True
        mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    out, lse = attention(q, k, v, mask, 0.4, softcap)
    z = 0.4 * q.double() @ k.double().mT
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z if mask is None else z + mask
    torch.testing.assert_close(out.double(), z.softmax(-1) @ v.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), z.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.fixture
def attention_on_a_gpu(monkeypatch):
    """Attention of tensors without numbers, which need no GPU; and the calls of its kernel."""
    kernel, calls = shared_prefix.flash_attention, []

    def watched(*args, **options):
        calls.append(args)
        return kernel(*args, **options)

    def is_16_bit(params):  # PyTorch's own answer is no, where it was built without CUDA
        return params.query.dtype in (torch.bfloat16, torch.float16)

    monkeypatch.setattr(shared_prefix, "flash_attention", watched)
    monkeypatch.setattr(shared_prefix, "can_use_flash_attention", is_16_bit)

    def attend(width=64, value_width=64, dtype=torch.bfloat16, masked=False, softcap=None):
        with FakeTensorMode():
            q, k, v, mask = (
                torch.empty(1, 2, *size, device="cuda", dtype=dtype)
                for size in ((10, width), (33, width), (33, value_width), (10, 33))
            )
            return attention(q, k, v, mask if masked else None, 0.1, softcap)

    return attend, calls


def test_a_gpu_attends_to_the_prefix_in_one_kernel(attention_on_a_gpu):
    attend, calls = attention_on_a_gpu
    out, lse = attend()
    assert len(calls) == 1
    assert (out.shape, out.dtype, out.device.type) == ((1, 2, 10, 64), torch.bfloat16, "cuda")
    assert (lse.shape, lse.dtype, lse.device.type) == ((1, 2, 10), torch.float32, "cuda")
    assert out.view(2, 5, 2, 64).shape == (2, 5, 2, 64)  # by rows again, without a copy


@pytest.mark.parametrize(
    "options",
    [
        dict(masked=True),
        dict(softcap=3.0),
        dict(width=60, value_width=60),
        dict(value_width=32),
        dict(dtype=torch.float32),
    ],
    ids=str,
)
def test_what_its_kernel_does_not_take_goes_through_products(options, attention_on_a_gpu):
    attend, calls = attention_on_a_gpu
    with contextlib.suppress(RuntimeError):  # PyTorch without CUDA has not even their shapes
        attend(**options)
    assert not calls


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "mistral", "gpt2"])
@torch.no_grad()
def test_a_prefix_read_in_pieces_is_the_one_read_whole(architecture, monkeypatch):
    model = make_model(architecture)
    ids = random_ids(50).tolist()
    whole = Prefix.read(model, ids)
    for piece in (1, 7, 50):
        monkeypatch.setattr(prefix_cache, "PIECE", piece)
        pieces = Prefix.read(model, ids)
        assert pieces.windows == whole.windows
        for a, b in zip(pieces.cache.layers, whole.cache.layers, strict=True):
            assert_close(a.keys, b.keys[:, :, -a.keys.shape[2] :])
            assert_close(a.values, b.values[:, :, -a.values.shape[2] :])


def named_in_the_documentation() -> set[str]:
    text = (ROOT / "docs/training/models.md").read_text()
    _, section = text.split("## Models whose queries do not share a context")
    return set(re.findall(r"`([\w-]+)`", section.split("\n## ")[0]))


@pytest.mark.slow
@torch.no_grad()
def test_every_architecture_shares_or_is_known_not_to():
    alone, found = named_in_the_documentation(), {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = toy_of(name)
        if model is None:
            continue
        ids = random_ids(60).tolist()
        try:
            prefix = Prefix.read(model, ids)
        except ValueError:  # a cache without a single layer of attention: only a toy has none
            assert name in alone
            continue
        found[name] = why_not_shared(model, prefix)
        if found[name] is None:
            rows = Rows(model, prefix, num_rows=2, capacity=40)
            own = random_ids(2, 40, seed=1)
            got = [rows.read(own[:, :10], [0, 0], [0, 1]), rows.read(own[:, 10:], [10] * 2, [0, 1])]
            for row, states in enumerate(torch.cat(got, dim=1)):
                expected = states_alone(model, ids, own[row].tolist())
                assert_close(states, expected, relative=1e-4)
    assert len(found) > 80
    assert {name for name, reason in found.items() if reason is not None} <= alone


def toy_of(model_type: str):
    """None: it cannot be built at this size, is no decoder of text, or trains no soft prompt."""
    torch.manual_seed(0)
    sizes = {**SIZES, "model_type": model_type}
    try:
        config = AutoConfig.for_model(**sizes)
        if getattr(config, "sliding_window", None) is not None:
            config = AutoConfig.for_model(**sizes, sliding_window=WINDOW)
        if config.get_text_config(decoder=True) is not config:
            return None
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in skeleton.parameters()) > 3e7:
            return None
        model = AutoModelForCausalLM.from_config(config).eval()
        check_model(model)
        hidden_states(model, input_ids=random_ids(1, 80), use_cache=False)
    except Exception:  # whatever a class says to sizes that are not its own
        return None
    return model
