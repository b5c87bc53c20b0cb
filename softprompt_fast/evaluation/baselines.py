"""What a model may read in the context's place, to be compared with the whole context.

full context      all of it: the teacher
no context        nothing
cut context       its first P tokens
pruned context    its P most surprising tokens, in their order
soft prompt       P virtual tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base_model.output_head import OutputHead, hidden_states
from ..data.queries import Query
from ..losses.functional import linear_nll

FULL, NONE, SOFT = "full context", "no context", "soft prompt"
CUT, PRUNED = "cut context", "pruned context"
CONDITIONS = (FULL, NONE, CUT, PRUNED, SOFT)


# By the tokens of an opening and a context, the positions in the context, most surprising first.
Rankings = dict[tuple[int, ...], Tensor]


def with_pruned_context(
    model: PreTrainedModel, queries: Sequence[Query], num_tokens: int, rankings: Rankings
) -> list[Query]:
    """The tokens that the model itself predicts least well are those that tell it most.

    Such a hard prompt is the simplest of Selective Context (Li et al., 2023): self-information of
    single tokens, in the model that will read them.

    rankings: those that are known; what is missing is computed, and kept there.
    """
    pruned = []
    for query in queries:
        key = (*query.before, *query.context)
        if len(query.context) > num_tokens:
            if key not in rankings:
                rankings[key] = surprise(model, query).argsort(descending=True, stable=True)
            kept = rankings[key][:num_tokens].sort().values.tolist()
            query = replace(query, context=[query.context[position] for position in kept])
        pruned.append(query)
    return pruned


@torch.no_grad()
def surprise(model: PreTrainedModel, query: Query) -> Tensor:
    """-log Pr(token | what stands before it) of each token of the context, in nats, on the CPU.

    [len(query.context)]; infinite for a token with nothing before it.
    """
    ids = torch.tensor([query.before + query.context], device=model.device)
    hidden = hidden_states(model, input_ids=ids, use_cache=False)[0, :-1]
    head = OutputHead.from_model(model)
    nll = linear_nll(hidden, head.weight, ids[0, 1:], reduction="none", **head.loss_options())
    first = nll.new_full((1,), torch.inf)
    return torch.cat([first, nll])[len(query.before) :].cpu()
