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
    weight = torch.ones_like(token_loss) if token_weight is None else token_weight
    weight = weight.to(token_loss.dtype)
    if keep is not None:
        # before the product: what is ignored may be infinite or NaN
        token_loss, weight = (torch.where(keep, value, 0.0) for value in (token_loss, weight))
    token_loss = token_loss * weight
    if reduction == "none":
        return token_loss
    if reduction == "sum":
        return token_loss.sum()
    # weights may cancel: then the mean is not finite, as it is in PyTorch
    return token_loss.sum() / torch.where((weight != 0).any(), weight.sum(), 1.0)
