"""Activation checkpointing of a frozen base: layers keep their input and compute the rest again.

transformers' layers do so while they train, and a frozen base never trains: its dropout would make
it another model. But ``training`` is a flag of each module by itself. Here the layer alone has it,
which is what its checkpointing asks for; the dropout modules inside of it stay in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .output_head import hidden_states


def set_checkpointing(base: PreTrainedModel, mode: bool) -> None:
    """Put ``base`` into evaluation mode, except that with ``mode`` its layers checkpoint, if
    checkpointing is enabled at all."""
    base.eval()
    for layer in _layers(base):
        layer.training = mode


@contextmanager
def without_checkpointing(base: PreTrainedModel) -> Iterator[None]:
    """For calls with a cache: layers that checkpoint drop it, and would not see what it holds."""
    layers = [layer for layer in _layers(base) if layer.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


@torch.no_grad()
def check_checkpointing(base: PreTrainedModel) -> None:
    """Raises ValueError if no layer of ``base`` checkpoints, or if one computes something else then
    (a layer that drops out activations by its own flag). Leaves ``base`` in evaluation mode."""
    name = type(base).__name__
    if not any(_layers(base)):
        raise ValueError(f"gradient_checkpointing: {name} has no layers that do it. Leave it out.")
    ids = torch.arange(8, device=base.device)[None]
    found = []
    for mode in (True, False):
        set_checkpointing(base, mode)
        found.append(hidden_states(base, input_ids=ids, use_cache=False))
    if not torch.equal(*found):
        raise ValueError(
            f"gradient_checkpointing: the layers of {name} have dropout that goes with it. "
            "Leave it out, or load the model with a dropout of 0 in its config."
        )


def _layers(base: PreTrainedModel) -> Iterator[GradientCheckpointingLayer]:
    for module in base.modules():
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            yield module
