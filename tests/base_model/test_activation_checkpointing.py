"""Activation checkpointing: the same gradient, with less kept for it."""

from __future__ import annotations

import pytest
import torch
from toy import SIZES, make_model
from toy_trainer import make_trainer, trained
from transformers import AutoConfig, AutoModelForCausalLM

from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig

# One option, before and after transformers renamed it.
CHECKPOINTING = dict(gradient_checkpointing=True)
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")


def gradient_and_bytes(trainer) -> tuple[torch.Tensor, int]:
    """The prompt's gradient in one step, and how much activation was kept for it."""
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()
    trainer.model.train()
    frozen = {p.data_ptr() for p in trainer.model.base.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in frozen:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = trainer.data_collator(trainer.train_dataset[:8])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return trainer.model.prompt.embedding.grad, sum(kept.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_the_gradient_is_the_same_and_less_is_kept(tmp_path, architecture, packing):
    model = make_model(architecture)  # gpt2's configuration has dropout
    expected, plain = gradient_and_bytes(make_trainer(tmp_path, model=model, packing=packing))
    found, less = gradient_and_bytes(
        make_trainer(tmp_path, model=model, packing=packing, **CHECKPOINTING)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert less < plain / 3


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_trains_alike(tmp_path, impl):
    model = make_model("gpt2")
    plain, checkpointed = (
        trained(make_trainer(tmp_path, model=model, loss_impl=impl, optim="sgd", **options))
        for options in ({}, CHECKPOINTING)
    )
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-6)
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_layers_checkpoint_only_while_the_student_trains(tmp_path):
    trainer = make_trainer(tmp_path, **CHECKPOINTING, max_steps=1)
    trainer.train()
    layers = list(trainer.model.base.model.layers)
    assert all(layer.training for layer in layers)
    assert {m for m in trainer.model.base.modules() if m.training} == set(layers)
    assert not any(m.training for m in trainer.model.eval().modules())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_layers_with_dropout_of_their_own_are_refused():
    torch.manual_seed(0)
    config = AutoConfig.for_model("opt", **SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.1)
    for dropout in (0.0, 0.1):
        config.dropout = dropout
        model = AutoModelForCausalLM.from_config(config)
        prompt = SoftPrompt.from_model(model, None, SoftPromptConfig(prompt_tuning_init="vocab"))
        student = SoftPromptModel(model, prompt)
        if dropout:
            with pytest.raises(ValueError, match="layers of OPTForCausalLM have dropout"):
                student.gradient_checkpointing_enable()
        else:
            student.gradient_checkpointing_enable()
