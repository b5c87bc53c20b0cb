"""A model that reads vectors of ours where it would embed a token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .output_head import input_embedding


@contextmanager
def read_as(
    model: PreTrainedModel, embeds: Tensor | None, *, in_all_calls: bool = False
) -> Iterator[None]:
    """The model's first call reads ``embeds`` [B, L, D] instead of its own embeddings of the ids.

    in_all_calls: later calls start with the same L tokens, and read them so too.

    What a model looks up by id besides, such as the inputs of each layer of Gemma 3n and 4, it
    finds for the ids of the call: 0 stands for a virtual token, as the placeholder of an image does
    in those models. ``inputs_embeds`` would leave it to guess, and ``generate(inputs_embeds=...)``
    is refused by Falcon-H1, Bamba, Zamba 2, CTRL and others.
    """
    if embeds is None:
        yield
        return
    is_read = False

    def replace(module: Any, args: Any, output: Tensor) -> Tensor:
        nonlocal is_read
        if not is_read and output.shape == embeds.shape:
            is_read = True
            return embeds
        if is_read and in_all_calls:
            return torch.cat([embeds, output[:, embeds.shape[1] :]], dim=1)
        return output

    hook = input_embedding(model).register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
    if not is_read:
        raise ValueError(
            f"{type(model).__name__} does not read all ids of a call through its input embeddings: "
            "it cannot read a soft prompt."
        )
