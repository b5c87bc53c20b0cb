"""The table of what fits on a card says what the shapes say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from render import prefix_memory
from render.prefix_memory import MODELS, Shape
from toy import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from softprompt_fast.base_model.held_prefix import HeldLayer, PrefixForm
from softprompt_fast.base_model.prefix_cache import Prefix

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_those_of_the_architecture(name):
    shape = MODELS[name]
    config = AutoConfig.for_model(
        "qwen2" if name.startswith("Qwen") else "llama",
        num_hidden_layers=shape.P,
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_attention_heads=shape.H,
        num_key_value_heads=shape.K,
        vocab_size=shape.V,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["auto", "int8"])
@torch.no_grad()
def test_a_prefix_takes_what_is_said(dtype):
    shape = Shape(2, 32, 48, 4, 2, 64, 259, False)
    model = make_model(head_dim=shape.d, dtype=torch.bfloat16)
    prefix = Prefix.read(model, list(range(200)) * 2, PrefixForm(dtype=dtype))
    held = [
        tensor
        for layer in prefix.cache.layers
        for tensor in (
            [t for part in layer.held for t in (part.numbers, part.ranges)]
            if isinstance(layer, HeldLayer)
            else [layer.keys, layer.values]
        )
    ]
    tokens = 512 if dtype == "int8" else 400  # whole groups
    expected = shape.int8(tokens) if dtype == "int8" else shape.bf16(tokens)
    assert sum(tensor.nbytes for tensor in held) == expected


def test_the_page_holds_the_table():
    page = (ROOT / "docs/training/context_memory.md").read_text()
    (table,) = re.findall(r"<!-- table: prefix_memory -->\n(.*?)<!-- end -->", page, re.DOTALL)
    assert table == f"{prefix_memory.table()}\n"
