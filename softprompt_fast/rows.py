"""The row kernels in plain PyTorch: logits of a chunk in, loss and gradient by the logits out.

Legend: C rows in a chunk, V vocabulary. All fp32. A row never looks at another row. Row kernels in
other languages have these names and shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import divergence


def sparse_target_rows(z: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy with one target a row, smoothed over the vocabulary.

    z [C, V], targets [C] -> loss [C], dz [C, V]. With o = logsumexp over all entries but the
    target, -log q_target = softplus(o - z_target) and 1 - q_target = sigmoid(o - z_target): a
    confident row keeps its relative accuracy, where lse - z_target and q_target - 1 would cancel.
    """
    smoothing, uniform = label_smoothing, label_smoothing / z.shape[-1]
    target = targets.unsqueeze(-1)
    # one number a row, in double: fp32 functions may round another way where rows are few
    z_target = z.gather(-1, target).double()
    others = z.scatter(-1, target, -torch.inf).logsumexp(-1, keepdim=True).double()
    lse = torch.logaddexp(others, z_target)
    odds = others - z_target + (lse - lse)  # NaN where the row has no finite normaliser
    loss = (1 - smoothing) * torch.logaddexp(odds, torch.zeros_like(odds))
    if smoothing:
        loss += smoothing * (lse - z.mean(-1, keepdim=True))
    dz = (z - lse.float()).exp_()
    dz.scatter_(-1, target, (smoothing - odds.sigmoid()).float())
    return loss.squeeze(-1).float(), dz.sub_(uniform) if uniform else dz


def divergence_rows(z: Tensor, z_teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence between teacher and student.    z, z_teacher [C, V] -> loss [C], dz [C, V]"""
    log_q = z.log_softmax(dim=-1)
    log_p = z_teacher.log_softmax(dim=-1)
    value, slope = divergence(beta)(log_p, log_q)
    dz = torch.addcmul(slope, log_q.exp(), slope.sum(-1, keepdim=True), value=-1)
    return value.sum(-1), dz
