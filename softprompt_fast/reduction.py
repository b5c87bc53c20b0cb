"""From a loss per token to what the caller asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def reduce_tokens(
    token_loss: Tensor, keep: Tensor | None, token_weight: Tensor | None, reduction: str
) -> Tensor:
    """Weigh and sum the tokens that count; "mean" divides by their number, or by their weight.

    token_loss [...]; keep [...] bool, None where all count; token_weight [...].
    With nothing that counts the sum and the mean are 0, never NaN.
    """
    if keep is not None:
        token_loss = torch.where(keep, token_loss, 0.0)
    if token_weight is not None:
        weight = token_weight.to(token_loss.dtype)
        token_loss = token_loss * weight
    if reduction == "none":
        return token_loss
    if reduction == "sum":
        return token_loss.sum()
    counted = torch.ones_like(token_loss) if token_weight is None else weight
    if keep is not None:
        counted = torch.where(keep, counted, 0.0)
    total = counted.sum()
    return token_loss.sum() / torch.where(total == 0, 1.0, total)
