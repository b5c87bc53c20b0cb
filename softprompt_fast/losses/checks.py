"""Every check on the tensors passed to a loss; an error names argument, value and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    names: Sequence[str] = ("hidden", "weight", "bias"),
) -> None:
    """hidden [..., D] in a supported dtype; weight [V, D] and bias [V] frozen, beside it."""
    hidden_name, weight_name, bias_name = names
    tensor(hidden_name, hidden)
    if hidden.dim() < 1:
        raise ValueError(f"{hidden_name} must have shape [..., D]: got a 0-dim tensor.")
    _float_dtype(hidden_name, hidden)
    _matrix(weight_name, weight, hidden)
    _float_dtype(weight_name, weight)
    _same_width(hidden_name, hidden, weight_name, weight)
    _dtype_of_head(hidden_name, hidden, weight_name, weight)
    if bias is not None:
        _bias(bias_name, bias, weight_name, weight, hidden)


def teacher(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
) -> None:
    """teacher [..., D_t] beside hidden; its own head [V, D_t], or the student's."""
    if not isinstance(teacher_hidden, Tensor):
        raise TypeError(
            f"teacher must be a tensor of hidden states [..., D]: got {_type(teacher_hidden)}."
        )
    tensor("teacher", teacher_hidden)
    if teacher_hidden.requires_grad:
        raise ValueError(
            "teacher must be constant: got requires_grad=True. Compute it under torch.no_grad()."
        )
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"teacher and hidden disagree on tokens: {tuple(teacher_hidden.shape)} "
            f"against {tuple(hidden.shape)}."
        )
    _float_dtype("teacher", teacher_hidden)
    _device("teacher", teacher_hidden, hidden)
    _dtype_of_head("teacher", teacher_hidden, "weight", weight)
    if teacher_weight is None:
        _same_width("teacher", teacher_hidden, "weight", weight)
        if teacher_bias is not None:
            raise ValueError("teacher_bias was given without teacher_weight.")
        return
    _matrix("teacher_weight", teacher_weight, hidden)
    _same_width("teacher", teacher_hidden, "teacher_weight", teacher_weight)
    _same_dtype("teacher_weight", teacher_weight, "weight", weight)
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            "teacher_weight and weight must share one vocabulary: "
            f"got {teacher_weight.shape[0]} and {weight.shape[0]} entries."
        )
    if teacher_bias is not None:
        _bias("teacher_bias", teacher_bias, "teacher_weight", teacher_weight, hidden)


def labels(name: str, value: Tensor, hidden: Tensor) -> None:
    """Token ids: an integer tensor of hidden's shape without its last dimension."""
    tensor("hidden", hidden)
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        got = value.dtype if isinstance(value, Tensor) else _type(value)
        raise TypeError(f"{name} must be an int64 or int32 tensor of token ids: got {got}.")
    tensor(name, value)
    _one_each(name, value, "token", hidden.shape[:-1], hidden)


def labels_in_range(value: Tensor, ignored: Tensor | None, vocabulary: int) -> None:
    """The first id that is neither ignored nor in [0, V) is an IndexError with its position."""
    outside = (value < 0) | (value >= vocabulary)
    if ignored is not None:
        outside &= ~ignored
    if outside.any():
        position = tuple(outside.nonzero()[0].tolist())
        raise IndexError(
            f"the target at {list(position)} is {int(value[position])}: "
            f"a token id must be in [0, {vocabulary}) or equal ignore_index."
        )


def factors(
    name: str, value: Tensor | None, each: str, shape: Sequence[int], hidden: Tensor
) -> None:
    """A constant factor for the loss of each token, or of each class."""
    if value is None:
        return
    tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor: got {value.dtype}.")
    if value.requires_grad:
        raise ValueError(f"{name} must be constant: got requires_grad=True.")
    _one_each(name, value, each, shape, hidden)


def tensor(name: str, value: Any) -> None:
    """A dense tensor, without a tangent: the op would drop it and the derivative would be 0."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor: got {_type(value)}.")
    if value.is_nested or value.layout != torch.strided:
        layout = "nested" if value.is_nested else str(value.layout)
        raise TypeError(f"{name} must be a dense tensor: got a {layout} one. Pad it or unpack it.")
    no_tangent(name, value)


def no_tangent(name: str, value: Tensor) -> None:
    """Forward-mode derivatives would be lost in silence."""
    if forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(
            f"softprompt_fast losses have no forward-mode derivative: {name} carries a tangent. "
            "Use softprompt_fast.reference with torch.func.jvp and torch.autograd.forward_ad."
        )


def _type(value: Any) -> str:
    return type(value).__name__


def _matrix(name: str, value: Tensor, hidden: Tensor) -> None:
    tensor(name, value)
    if value.dim() != 2 or 0 in value.shape:
        raise ValueError(
            f"{name} must have shape [V, D], neither of them 0: got {tuple(value.shape)}."
        )
    _frozen(name, value)
    _device(name, value, hidden)


def _bias(name: str, bias: Tensor, weight_name: str, weight: Tensor, hidden: Tensor) -> None:
    tensor(name, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} must have shape [V] = [{weight.shape[0]}] like {weight_name}: "
            f"got {tuple(bias.shape)}."
        )
    _frozen(name, bias)
    _device(name, bias, hidden)
    _same_dtype(name, bias, weight_name, weight)


def _one_each(name: str, value: Tensor, each: str, shape: Sequence[int], hidden: Tensor) -> None:
    if value.shape != shape:
        raise ValueError(
            f"{name} must have one entry per {each}, shape {tuple(shape)}: "
            f"got {tuple(value.shape)}."
        )
    _device(name, value, hidden)


def _frozen(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name} must be frozen: got requires_grad=True, shape {tuple(value.shape)}. "
            f"Call {name}.requires_grad_(False); only the soft prompt is trained here."
        )


def _device(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(
            f"{name} is on {value.device} but the hidden states are on {hidden.device}: "
            "move one of them."
        )


def _same_width(name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} and {weight_name} disagree on the hidden width D: "
            f"{tuple(hidden.shape)} against {tuple(weight.shape)}."
        )


def autocasts(device: torch.device) -> bool:
    """Under autocast the small side is cast: the hidden states, never the head."""
    available = torch.amp.is_autocast_available(device.type)
    return available and torch.is_autocast_enabled(device.type)


def _float_dtype(name: str, value: Tensor) -> None:
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16 or float16: got {value.dtype}. "
            "softprompt_fast.reference computes in float64."
        )


def _dtype_of_head(name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    if hidden.dtype != weight.dtype and not autocasts(hidden.device):
        raise TypeError(
            f"{name} is {hidden.dtype} but {weight_name} is {weight.dtype}: "
            "cast one of them, or run under torch.autocast."
        )


def _same_dtype(name: str, value: Tensor, weight_name: str, weight: Tensor) -> None:
    if value.dtype != weight.dtype:
        raise TypeError(
            f"{name} is {value.dtype} but {weight_name} is {weight.dtype}: cast one of them."
        )
