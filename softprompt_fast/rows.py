"""The row kernels in plain PyTorch: logits of a chunk in, loss and gradient by the logits out.

Legend: C rows in a chunk, V vocabulary. All fp32. A row never looks at another row. Row kernels in
other languages have these names and shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import divergence


def sparse_target_rows(
    z: Tensor,
    targets: Tensor,
    label_smoothing: float,
    more_targets: Tensor | None = None,
    masses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy against a target distribution t that is spread evenly but for a few entries.

    z [C, V], targets [C], more_targets [C, K], masses [C, 1 + K] as in ``Problem`` ->
    loss [C] = lse - sum of t_v z_v over all but the tail, dz [C, V] = q - t without the tail.

    With o = logsumexp over all entries but the target, -log q_target = softplus(o - z_target) and
    1 - q_target = sigmoid(o - z_target): a confident row keeps its relative accuracy, where
    lse - z_target and q_target - 1 would cancel.
    """
    smoothing, uniform = label_smoothing, label_smoothing / z.shape[-1]
    target = targets.unsqueeze(-1)
    # one number a row, in double: fp32 functions may round another way where rows are few
    z_target = z.gather(-1, target).double()
    other_z = z.scatter(-1, target, -torch.inf)
    top = other_z.amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    others = other_z.sub_(top).exp_().sum(-1, keepdim=True, dtype=torch.float64).log() + top
    lse = torch.logaddexp(others, z_target)
    odds = others - z_target + (lse - lse)  # NaN where the row has no finite normaliser
    loss = (1 - smoothing) * torch.logaddexp(odds, torch.zeros_like(odds))
    if smoothing:
        loss += smoothing * (lse - z.mean(-1, keepdim=True))
    rest = torch.full_like(odds, smoothing)  # what t has outside the target
    dz = (z - lse.float()).exp_()
    if more_targets is not None and masses is not None:
        tail, more = masses[:, :1].double(), masses[:, 1:]
        entries = torch.where(more > 0, more_targets, target)
        rest += tail + more.sum(-1, keepdim=True, dtype=torch.float64)
        # all measured from z_target: what p is sure of is exact
        terms = torch.where(more > 0, more * (z.gather(-1, entries) - z_target), 0.0)
        loss += tail * z_target - terms.sum(-1, keepdim=True)
        loss = torch.where(z_target == -torch.inf, odds, loss)
        dz.scatter_add_(-1, entries, -more)
    dz.scatter_(-1, target, (rest - odds.sigmoid()).float())
    return loss.squeeze(-1).float(), dz.sub_(uniform) if uniform else dz


def divergence_rows(z: Tensor, z_teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence between teacher and student.    z, z_teacher [C, V] -> loss [C], dz [C, V]"""
    log_q = z.log_softmax(dim=-1)
    log_p = z_teacher.log_softmax(dim=-1)
    value, slope = divergence(beta)(log_p, log_q)
    dz = torch.addcmul(slope, log_q.exp(), slope.sum(-1, keepdim=True), value=-1)
    return value.sum(-1), dz
