"""Every check on what a user passes to a loss; an error names argument, value and remedy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .losses import LossOptions

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")


def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden [..., D] in a supported dtype; weight [V, D] and bias [V] frozen, beside it."""
    if hidden.dim() < 1:
        raise ValueError("hidden must have shape [..., D]: got a 0-dim tensor.")
    if hidden.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"hidden must be float32, bfloat16 or float16: got {hidden.dtype}. "
            "softprompt_fast.reference computes in float64."
        )
    _matrix("weight", weight)
    if weight.shape[0] == 0:
        raise ValueError(f"weight has an empty vocabulary: shape {tuple(weight.shape)}.")
    _same_width("hidden", hidden, "weight", weight)
    _frozen("weight", weight)
    _beside("weight", weight, hidden)
    if bias is not None:
        _bias("bias", bias, "weight", weight, hidden)


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
            "teacher must be a tensor of hidden states [..., D]: "
            f"got {type(teacher_hidden).__name__}."
        )
    if teacher_hidden.requires_grad:
        raise ValueError(
            "teacher must be constant: got requires_grad=True. Compute it under torch.no_grad()."
        )
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"teacher and hidden disagree on tokens: {tuple(teacher_hidden.shape)} "
            f"against {tuple(hidden.shape)}."
        )
    _beside("teacher", teacher_hidden, hidden)
    if teacher_weight is None:
        _same_width("teacher", teacher_hidden, "weight", weight)
        if teacher_bias is not None:
            raise ValueError("teacher_bias was given without teacher_weight.")
        return
    _matrix("teacher_weight", teacher_weight)
    _same_width("teacher", teacher_hidden, "teacher_weight", teacher_weight)
    _frozen("teacher_weight", teacher_weight)
    _beside("teacher_weight", teacher_weight, hidden)
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            "teacher_weight and weight must share one vocabulary: "
            f"got {teacher_weight.shape[0]} and {weight.shape[0]} entries."
        )
    if teacher_bias is not None:
        _bias("teacher_bias", teacher_bias, "teacher_weight", teacher_weight, hidden)


def labels(name: str, value: Tensor, hidden: Tensor) -> None:
    """Token ids: an integer tensor of hidden's shape without its last dimension."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor of token ids: got {got}.")
    _per_token(name, value, hidden)


def token_weight(value: Tensor | None, hidden: Tensor) -> None:
    if value is None:
        return
    if not value.is_floating_point():
        raise TypeError(f"token_weight must be a floating-point tensor: got {value.dtype}.")
    if value.requires_grad:
        raise ValueError("token_weight must be constant: got requires_grad=True.")
    _per_token("token_weight", value, hidden)


def labels_in_range(name: str, value: Tensor, ignored: Tensor | None, vocabulary: int) -> None:
    """The first id that is neither ignored nor in [0, V) is an IndexError with its position."""
    outside = (value < 0) | (value >= vocabulary)
    if ignored is not None:
        outside &= ~ignored
    if outside.any():
        position = tuple(outside.nonzero()[0].tolist())
        where = position[0] if len(position) == 1 else position
        raise IndexError(
            f"{name}[{where}] is {int(value[position])}: a token id must be in [0, {vocabulary}) "
            "or equal ignore_index."
        )


def numbers(
    options: LossOptions, *, label_smoothing: float, beta: float, alpha: float | None
) -> None:
    """The numbers beside the tensors."""
    temperature, softcap = options.temperature, options.softcap
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a finite number above 0: got {temperature}.")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or a finite number above 0: got {softcap}.")
    if not -math.inf < options.logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite: got {options.logit_scale}.")
    for name, value in (("label_smoothing", label_smoothing), ("beta", beta), ("alpha", alpha)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1]: got {value}.")
    if options.reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(REDUCTIONS)}: got {options.reduction!r}."
        )
    if not options.workspace_mib > 0:
        raise ValueError(f"workspace_mib must be above 0 MiB: got {options.workspace_mib}.")


def workspace(needed_bytes: float, workspace_mib: float, what: str) -> None:
    """The smallest piece of work must fit the workspace."""
    if needed_bytes > workspace_mib * 2**20:
        raise ValueError(
            f"workspace_mib={workspace_mib:g} is too small: {what} needs "
            f"{math.ceil(needed_bytes / 2**20)} MiB."
        )


def _matrix(name: str, value: Tensor) -> None:
    if value.dim() != 2:
        raise ValueError(f"{name} must have shape [V, D]: got {tuple(value.shape)}.")


def _frozen(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name} must be frozen: got requires_grad=True, shape {tuple(value.shape)}. "
            f"Call {name}.requires_grad_(False); only the soft prompt is trained here."
        )


def _bias(name: str, bias: Tensor, weight_name: str, weight: Tensor, hidden: Tensor) -> None:
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} must have shape [V] = [{weight.shape[0]}] like {weight_name}: "
            f"got {tuple(bias.shape)}."
        )
    _frozen(name, bias)
    _beside(name, bias, hidden)


def _beside(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(
            f"{name} is on {value.device} but hidden is on {hidden.device}: move one of them."
        )
    if value.dtype != hidden.dtype:
        raise TypeError(
            f"{name} is {value.dtype} but hidden is {hidden.dtype}: "
            "cast one of them, or run under torch.autocast."
        )


def _same_width(name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name} and {weight_name} disagree on the hidden width D: "
            f"{tuple(hidden.shape)} against {tuple(weight.shape)}."
        )


def _per_token(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} must have one entry per token, shape {tuple(hidden.shape[:-1])}: "
            f"got {tuple(value.shape)}."
        )
    if value.device != hidden.device:
        raise ValueError(
            f"{name} is on {value.device} but hidden is on {hidden.device}: move one of them."
        )
