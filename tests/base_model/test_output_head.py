"""The loss through our hidden-state path is the loss on the model's own logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from toy import ARCHITECTURES, SIZES, VOCAB, make_model
from transformers import AutoConfig, AutoModelForCausalLM

import softprompt_fast as spf
from softprompt_fast.base_model.checks import check_model
from softprompt_fast.base_model.output_head import OutputHead, decoder, hidden_states


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_logits_equal_those_of_the_model(architecture):
    model = make_model(architecture)
    ids = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = hidden_states(model, input_ids=ids)
    head = OutputHead.from_model(model)

    assert not head.weight.requires_grad
    torch.testing.assert_close(head.logits(hidden), expected)
    torch.testing.assert_close(
        spf.linear_nll(hidden[:, :-1], head.weight, ids[:, 1:], **head.loss_options()),
        F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_known_architectures_pass_the_check(architecture, dtype):
    check_model(make_model(architecture, dtype=dtype))


def test_a_head_with_a_bias():
    model = make_model("llama")
    layer = model.get_output_embeddings()
    layer.bias = torch.nn.Parameter(torch.randn(VOCAB))
    check_model(model)
    assert torch.equal(OutputHead.from_model(model).bias, layer.bias)


def test_an_unknown_change_of_the_logits_is_named():
    model = make_model("llama")
    model.get_output_embeddings().register_forward_hook(lambda *args: 1.01 * args[-1])
    with pytest.raises(
        ValueError, match=r"logits of LlamaForCausalLM .* differ at entry \d+: -?\d"
    ):
        check_model(model)


def test_a_decoder_whose_head_goes_by_its_name():
    """ModernBERT's decoder calls its head "decoder", and transforms before it what it reads."""
    config = AutoConfig.for_model(
        "modernbert-decoder",
        **{**SIZES, "global_rope_theta": 1e4, "layer_types": ["full_attention"] * 2},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert decoder(model) is model.model
    with pytest.raises(ValueError, match="logits of ModernBertDecoderForCausalLM .* differ at"):
        check_model(model)


def test_a_model_without_a_head_is_refused():
    body = make_model("llama").get_decoder()
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        OutputHead.from_model(body)
