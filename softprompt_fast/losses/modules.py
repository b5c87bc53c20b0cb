"""The losses as nn.Module, and under PyTorch's own name and signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from . import checks
from .functional import linear_kl, linear_nll
from .options import LossOptions, check_options


class _WithOptions(nn.Module):
    loss: ClassVar[Callable[..., Tensor]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        parameters = inspect.signature(self.loss).parameters.values()
        own = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY]
        for name in options:
            if name not in (valid := [*own, *LossOptions._fields]):
                raise TypeError(
                    f"{type(self).__name__} has no option {name!r}: it takes {', '.join(valid)}."
                )
        check_options(**options)
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearNLLLoss(_WithOptions):
    """``linear_nll``, its options fixed: ``LinearNLLLoss(**options)(hidden, weight, targets)``."""

    loss = staticmethod(linear_nll)

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **tensors: Any) -> Tensor:
        """``tensors``: bias, token_weight, or any option for this call only."""
        return self.loss(hidden, weight, targets, **{**self.options, **tensors})


class LinearKLLoss(_WithOptions):
    """``linear_kl``, its options fixed: ``LinearKLLoss(beta=0.5)(hidden, weight, teacher)``."""

    loss = staticmethod(linear_kl)

    def forward(self, hidden: Tensor, weight: Tensor, teacher: Tensor, **tensors: Any) -> Tensor:
        """``tensors``: labels, bias, teacher_weight, token_weight, or any option for this call."""
        return self.loss(hidden, weight, teacher, **{**self.options, **tensors})


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: None = None,
) -> Tensor:
    """``torch.nn.functional.linear_cross_entropy`` with a frozen head: same signature, fp32 loss.

    input [N, D] or [D]    linear_weight [V, D], frozen    target [N] or [], class indices

    ``weight`` [V] rescales each class and the mean, as in PyTorch. Two differences: a batch in
    which every target is ignored has mean 0, not NaN, and ``options`` must be None, for nothing
    needs to be chosen. Raises TypeError for class probabilities, ValueError for ``weight`` with
    label smoothing.
    """
    if options is not None:
        raise ValueError(
            "options must be None: chunking is chosen by linear_nll(..., workspace_mib=...)."
        )
    # under its own names first: what linear_nll would say is about other arguments
    checks.head(input, linear_weight, linear_bias, ("input", "linear_weight", "linear_bias"))
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(
            f"target must hold class indices: got class probabilities ({target.dtype}, "
            f"shape {tuple(target.shape)}), which only PyTorch's own function takes."
        )
    checks.labels("target", target, input)
    checks.factors("weight", weight, "class", linear_weight.shape[:1], input)
    token_weight = None
    if weight is not None:
        if label_smoothing:
            raise ValueError("weight and label_smoothing cannot be combined here.")
        # a target outside the vocabulary is refused later
        token_weight = weight[target.clamp(0, len(weight) - 1).long()]
    return linear_nll(
        input,
        linear_weight,
        target,
        bias=linear_bias,
        label_smoothing=label_smoothing,
        ignore_index=-100 if ignore_index is None else ignore_index,
        token_weight=token_weight,
        reduction=reduction,
    )
