"""The losses as nn.Module, and under PyTorch's own name and signature."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .losses import linear_kl, linear_nll


class _WithOptions(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearNLLLoss(_WithOptions):
    """``linear_nll``, its options fixed: ``LinearNLLLoss(**options)(hidden, weight, targets)``."""

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **tensors: Any) -> Tensor:
        """``tensors``: bias, token_weight, or any option for this call only."""
        return linear_nll(hidden, weight, targets, **{**self.options, **tensors})


class LinearKLLoss(_WithOptions):
    """``linear_kl``, its options fixed: ``LinearKLLoss(beta=0.5)(hidden, weight, teacher)``."""

    def forward(self, hidden: Tensor, weight: Tensor, teacher: Tensor, **tensors: Any) -> Tensor:
        """``tensors``: labels, bias, teacher_weight, token_weight, or any option for this call."""
        return linear_kl(hidden, weight, teacher, **{**self.options, **tensors})


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

    input [N, D] or [D]    linear_weight [V, D], frozen    target [N] or [] class indices
    ``weight`` [V] rescales each class and the mean, as in PyTorch. Two differences: a batch in
    which every target is ignored has mean 0, not NaN, and ``options`` must be None, for nothing
    needs to be chosen. Raises TypeError for class probabilities, ValueError for ``weight`` with
    label smoothing.
    """
    if options is not None:
        raise ValueError(
            "options must be None: chunking is chosen by linear_nll(..., workspace_mib=...)."
        )
    ignore_index = -100 if ignore_index is None else ignore_index
    if target.is_floating_point():
        raise TypeError(
            f"target must hold class indices: got class probabilities ({target.dtype}, "
            f"shape {tuple(target.shape)}), which only PyTorch's own function takes."
        )
    token_weight = None
    if weight is not None:
        if label_smoothing:
            raise ValueError("weight and label_smoothing cannot be combined here.")
        if weight.shape != linear_weight.shape[:1]:
            raise ValueError(
                f"weight must have one entry per class, [{linear_weight.shape[0]}]: "
                f"got shape {tuple(weight.shape)}."
            )
        classes = target.clamp(0, weight.shape[0] - 1).long()
        token_weight = weight[classes]
    return linear_nll(
        input,
        linear_weight,
        target,
        bias=linear_bias,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        token_weight=token_weight,
        reduction=reduction,
    )
