"""The row kernels of csrc/cuda: the logits of a chunk in, loss and gradient by the raw product out.

Logits are raw products [C, V] in fp32 whose rows begin at multiples of 8 entries. What lies between
V and the stride is not used. dz, in the head's dtype, may begin where the logits begin: a row of
the gradient then overwrites the row it comes from. Without dz only the loss is computed.

Legend: C rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formulas import IDENTITY, LogitTransform
from .problem import NO_TARGET, SparseTarget


def sparse_target_rows_(
    logits: Tensor,
    target: SparseTarget,
    loss: Tensor,
    dz: Tensor | None,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    keep: Tensor | None = None,
    unscale: Tensor | None = None,
) -> None:
    """Cross-entropy: fills loss [C] and, where they are given, dz [C, V] and unscale [C].

    target, without a tail, over [C]; a row with an id outside the vocabulary becomes NaN.
    keep [C] bool: where False, loss and dz are 0 whatever the row holds    bias [V]
    unscale [C]: for dz in fp16, which leaves the kernel times a power of two; this undoes it
    """
    with torch.cuda.device(logits.device):
        torch.ops.softprompt_fast_C.sparse_target_rows_(
            logits,
            *target.entries(),
            _as(dz, bias),
            *transform,
            keep,
            loss,
            dz,
            unscale,
            torch.cuda.current_stream().cuda_stream,
        )


def divergence_rows_(
    logits: Tensor,
    teacher_logits: Tensor,
    loss: Tensor,
    dz: Tensor | None,
    *,
    beta: float = 0.0,
    target: SparseTarget = NO_TARGET,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    keep: Tensor | None = None,
    unscale: Tensor | None = None,
) -> None:
    """alpha * divergence(beta) + (1 - alpha) * cross-entropy; see ``sparse_target_rows_``.

    Without a target, a label, there is no second term.
    teacher_logits [C, V], like logits, never written
    """
    with torch.cuda.device(logits.device):
        torch.ops.softprompt_fast_C.divergence_rows_(
            logits,
            teacher_logits,
            beta,
            *target.entries(),
            alpha,
            _as(dz, bias),
            _as(dz, teacher_bias),
            *transform,
            keep,
            loss,
            dz,
            unscale,
            torch.cuda.current_stream().cuda_stream,
        )


def _as(dz: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The kernels know one dtype beside fp32; over a very small head dz is wider than the bias."""
    return bias if bias is None or dz is None else bias.to(dz.dtype)
