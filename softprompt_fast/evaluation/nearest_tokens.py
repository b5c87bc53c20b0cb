"""The tokens of the vocabulary that a soft prompt's vectors lie nearest to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base_model.output_head import input_embedding
from ..utils.text import text_of

NEIGHBOURS = 3
# Token embeddings that are compared at a time.
CHUNK = 8192


@torch.no_grad()
def nearest_tokens(
    model: PreTrainedModel, tokenizer: Any, embedding: Tensor
) -> list[dict[str, Any]]:
    """For each vector of ``embedding`` [P, D], as JSON values:

    tokens: the NEIGHBOURS with the largest cosine, and the cosine
    relative_norm: its length, in lengths of the mean token embedding
    """
    embed = input_embedding(model)
    vectors = embedding.to(embed.weight.device).float()
    directions = torch.nn.functional.normalize(vectors, dim=-1)
    best = torch.empty(len(vectors), 0, device=vectors.device)
    ids = torch.empty(len(vectors), 0, dtype=torch.long, device=vectors.device)
    norms = []
    for chunk in torch.arange(len(embed.weight), device=vectors.device).split(CHUNK):
        # By the layer and not its weight: some models scale what they look up.
        rows = embed(chunk).float()
        norms.append(rows.norm(dim=-1))
        cosine = directions @ torch.nn.functional.normalize(rows, dim=-1).T
        best, ids = (
            torch.cat([best, cosine], 1),
            torch.cat([ids, chunk.expand(len(vectors), -1)], 1),
        )
        best, order = best.topk(min(NEIGHBOURS, best.shape[1]), dim=-1)
        ids = ids.gather(1, order)
    scale = torch.cat(norms).mean()
    return [
        {
            "relative_norm": (vector.norm() / scale).item(),
            "tokens": [
                {"text": text_of(tokenizer, [token]), "cosine": cosine}
                for token, cosine in zip(row.tolist(), cosines.tolist(), strict=True)
            ],
        }
        for vector, row, cosines in zip(vectors, ids, best, strict=True)
    ]
