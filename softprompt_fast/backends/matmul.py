"""The head's two matrix products on a GPU: fp32 results from inputs in any supported dtype.

Logits are never rounded to 16 bits, and neither is the gradient before the upstream gradient is
applied. Where there is no such product (on a CPU, under Triton's interpreter) the inputs are
widened: exact, for the product of two 16-bit numbers fits fp32.

Legend: C rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In a smaller head than this, roundings of dz are too few to average out.
LEAST_16_BIT = 64
# Entries of the vocabulary in one fp32 product back: a longer sum would lose digits.
HEAD_BLOCK = 4096


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """In which dz [C, V] is multiplied back: the head's own, but for a very small head."""
    return weight.dtype if min(weight.shape) >= LEAST_16_BIT else torch.float32


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [C, V] fp32 = hidden [C, D] @ weight.T"""
    if hidden.is_cuda or hidden.dtype == torch.float32:
        return _mm(hidden, weight.T, out)
    for start in range(0, len(weight), HEAD_BLOCK):
        columns = slice(start, start + HEAD_BLOCK)
        out[:, columns] = hidden.float() @ weight[columns].float().T


def project_back(dz: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [C, D] fp32 = dz [C, V] @ weight"""
    if dz.dtype != torch.float32:
        return _mm(dz, weight, out)
    out.zero_()
    for start in range(0, len(weight), HEAD_BLOCK):
        columns = slice(start, start + HEAD_BLOCK)
        out += dz[:, columns] @ weight[columns].float()


def _mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)
