"""The options that all losses share, what a loss's numbers may be, and how tokens are reduced."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LossOptions(NamedTuple):
    """What every loss takes by keyword."""

    bias: Tensor | None = None
    """[V], frozen"""
    softcap: float | None = None
    """z becomes softcap * tanh(z / softcap), before the temperature (Gemma)"""
    logit_scale: float = 1.0
    """factor on the product (Cohere; for Granite 1 / logits_scaling)"""
    temperature: float = 1.0
    """divides the logits, the teacher's too"""
    ignore_index: int = -100
    """tokens with this label count nothing: no loss, no gradient, no work"""
    token_weight: Tensor | None = None
    """[...], a factor for each token's loss"""
    reduction: str = "mean"
    """mean (over the tokens, or the token_weight, that count; 0 where none does), sum or none"""
    backend: str = "auto"
    """auto, or a name from ``backends.available()``"""
    workspace_mib: float = 256
    """MiB that may be allocated beyond inputs, loss and gradient"""


class Number(NamedTuple):
    """What an option that is a number may be."""

    allowed: Callable[[Any], bool]
    text: str
    kind: type = Real


def _normal(value: float) -> bool:
    """In float32 a smaller number may become 0, and a larger one infinite."""
    return 1.2e-38 <= abs(float(value)) <= 3.4e38


NORMAL = "in float32's range, 1.2e-38 to 3.4e+38"
POSITIVE = Number(lambda x: x > 0 and _normal(x), f"above 0 and {NORMAL}")
FRACTION = Number(lambda x: 0 <= x <= 1, "in [0, 1]")
NUMBERS = {
    "softcap": POSITIVE._replace(text=f"None, or {POSITIVE.text}"),
    "logit_scale": Number(lambda x: x == 0 or _normal(x), f"0, or its magnitude {NORMAL}"),
    "temperature": POSITIVE,
    "label_smoothing": FRACTION,
    "beta": FRACTION,
    "alpha": FRACTION,
    "top_k": Number(lambda x: x >= 1, "at least 1", kind=Integral),
    "workspace_mib": POSITIVE,
    "ignore_index": Number(lambda x: -(2**63) <= x < 2**63, "an int64", kind=Integral),
}
REDUCTIONS = ("mean", "sum", "none")


def check_options(**given: Any) -> None:
    """TypeError or ValueError for numbers and a reduction that no loss takes; the rest passes.

    A tensor is no number here: the gradient that it may want would be lost in silence.
    """
    for name, value in given.items():
        if name in NUMBERS and not (name == "softcap" and value is None):
            _check_number(name, value, NUMBERS[name])
    if (reduction := given.get("reduction", "mean")) not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}: got {reduction!r}.")


def _check_number(name: str, value: Any, rule: Number) -> None:
    if isinstance(value, bool) or not isinstance(value, rule.kind):
        kind = "an int" if rule.kind is Integral else "an int or a float"
        remedy = " Options are constants: pass .item()." if isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be {kind}: got {type(value).__name__} {value!r}.{remedy}")
    if not rule.allowed(value):
        raise ValueError(f"{name} must be {rule.text}: got {value}.")


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
