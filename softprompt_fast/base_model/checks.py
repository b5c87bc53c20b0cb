"""What must hold of a model and of what it is to read, so that a soft prompt can be learned."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .output_head import OutputHead, hidden_states, input_embedding
from .virtual_tokens import read_as


def check_ids(model: PreTrainedModel, ids: Iterable[int], source: str) -> None:
    """Raises ValueError if a token has no embedding: one that was added to the tokenizer alone."""
    largest, rows = max(ids, default=0), input_embedding(model).weight.shape[0]
    if largest >= rows:
        raise ValueError(
            f"{source or 'a query'}: token {largest} has no embedding, the model has {rows}. Its "
            "tokenizer was given more tokens: resize the model's embeddings, or keep the text and "
            "the chat template free of them."
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read, None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def position_switch(model: PreTrainedModel) -> float:
    """The longest call by whose length no position is changed; infinite for most models.

    LongRoPE (Phi-3) turns all keys of a longer call by other angles, the first one's too.
    """
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    return min(
        (k["original_max_position_embeddings"] for k in kinds if k.get("rope_type") == "longrope"),
        default=math.inf,
    )


def on_one_side(lengths: Iterable[int], switch: float) -> Iterator[slice]:
    """The rows of so many tokens, in their order, in parts on one side of ``position_switch``."""
    start = 0
    for _, rows in groupby(lengths, key=lambda length: length > switch):
        stop = start + len(list(rows))
        yield slice(start, stop)
        start = stop


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """A few tokens read by ids, and as vectors that no token has.

    Raises ValueError with the numbers if the model does something to its logits that ``OutputHead``
    does not know, or if virtual tokens do not reach it.
    """
    name = type(model).__name__
    ids = some_ids(model)
    hidden = hidden_states(model, input_ids=ids, use_cache=False)
    _require_equal(
        f"the logits of {name} by OutputHead (first) and by the model",
        OutputHead.from_model(model).logits(hidden),
        model(input_ids=ids, use_cache=False).logits,
        model.dtype,
        "The model transforms its logits in a way that OutputHead does not know.",
    )
    with read_as(model, unknown_vectors(model, ids)):
        moved = hidden_states(model, input_ids=ids, use_cache=False)
    if torch.equal(moved, hidden) or not moved.isfinite().all():
        raise ValueError(
            f"{name} does not read its input embeddings as numbers: soft prompts cannot reach it."
        )


@torch.no_grad()
def check_reads_embeds(model: PreTrainedModel) -> None:
    """Raises ValueError if ``inputs_embeds`` alone, as PEFT and servers pass them, are not all that
    the model reads of a token."""
    ids = some_ids(model)
    embeds = input_embedding(model)(ids)
    embeds[:, :4], ids[:, :4] = unknown_vectors(model, ids)[:, :4], 0
    with read_as(model, embeds):
        ours = hidden_states(model, input_ids=ids, use_cache=False)
    meaning = "It looks up more by a token's id: others, who pass it embeddings alone, cannot."
    try:
        theirs = hidden_states(model, inputs_embeds=embeds, use_cache=False)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{type(model).__name__} takes no inputs_embeds. {meaning}") from error
    _require_equal(
        f"the hidden states of {type(model).__name__} here (first) and from inputs_embeds",
        *(ours, theirs, model.dtype, meaning),
    )


def some_ids(model: PreTrainedModel) -> Tensor:
    """[1, 8], from all over the vocabulary: a padding or unused token may be embedded as zero."""
    return torch.arange(1, 9, device=model.device)[None] * len(input_embedding(model).weight) // 9


def unknown_vectors(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Vectors between the embeddings of tokens, as virtual tokens are. Of the shape of theirs."""
    embeds = input_embedding(model)(ids)
    return 0.75 * embeds + 0.25 * embeds.flip(1)


def _require_equal(
    what: str, ours: Tensor, theirs: Tensor, dtype: torch.dtype, meaning: str
) -> None:
    # A logit is rounded in the model's dtype once for each operation after the product, whatever
    # dtype it is returned in.
    relative = max(1e-4, 4 * torch.finfo(dtype).eps)
    ours, theirs = ours.float(), theirs.float()
    difference = (ours - theirs).abs()
    if difference.max() <= relative * theirs.abs().max().clamp(min=1e-3):
        return
    worst = int(difference.argmax())
    raise ValueError(
        f"{what} differ at entry {worst}: {ours.flatten()[worst]:.6g} and "
        f"{theirs.flatten()[worst]:.6g}. {meaning}"
    )
