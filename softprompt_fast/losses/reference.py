"""The losses as anyone would write them in PyTorch: full logits, and autograd for the gradient.

They are the oracle of the tests and ``loss_impl="reference"`` of the trainer. They take any
floating dtype: float64 stays float64, everything else is computed in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.formulas import LogitTransform
from . import checks
from .options import reduce_tokens


def logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """softcap(logit_scale * (hidden @ weight.T + bias)) / temperature.    [..., D] -> [..., V]"""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    raw = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return LogitTransform(softcap, logit_scale, temperature)(raw)


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    **head: Any,
) -> Tensor:
    """``F.cross_entropy`` on materialised logits. ``head``: the options of ``logits``."""
    z = logits(hidden, weight, **head)
    checks.labels_in_range(targets, targets == ignore_index, z.shape[-1])
    token_loss = F.cross_entropy(
        z.reshape(-1, z.shape[-1]),
        targets.flatten().long(),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    ).view(targets.shape)
    return reduce_tokens(token_loss, targets != ignore_index, token_weight, reduction)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    *,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.0,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    bias: Tensor | None = None,
    **head: Any,
) -> Tensor:
    """KL(p || q), KL(q || p) or generalised JSD of two materialised softmaxes, in nats."""
    log_q = logits(hidden, weight, bias=bias, **head).log_softmax(-1)
    with torch.no_grad():
        own_head = (weight, bias) if teacher_weight is None else (teacher_weight, teacher_bias)
        log_p = logits(teacher, own_head[0], bias=own_head[1], **head).log_softmax(-1)
    if beta == 0.0:
        token_loss = _kl(log_p, log_q)
    elif beta == 1.0:
        token_loss = _kl(log_q, log_p)
    else:
        # logaddexp has no derivative where both are -inf; e^-1e4 is 0 as well
        absent = log_p.isneginf() & log_q.isneginf()
        log_p, log_q = log_p.masked_fill(absent, -1e4), log_q.masked_fill(absent, -1e4)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        token_loss = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    keep = None if labels is None else labels != ignore_index
    return reduce_tokens(token_loss, keep, token_weight, reduction)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q). An entry that p cannot give has no part in it, whatever q is there."""
    absent = log_p.exp() == 0
    log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def linear_distill(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.0,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """alpha * linear_kl + (1 - alpha) * linear_nll, over the tokens whose target counts."""
    nll = linear_nll(hidden, weight, targets, label_smoothing=label_smoothing, **options)
    if alpha == 0:
        return nll
    kl = linear_kl(
        hidden,
        weight,
        teacher,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        beta=beta,
        labels=targets,
        **options,
    )
    # a term without weight may be infinite
    return kl if alpha == 1 else alpha * kl + (1 - alpha) * nll
