"""The formulas, one vocabulary entry at a time: from raw products to logits, then to a divergence.

A divergence between teacher p and student q maps ``(log_p, log_q)`` to ``(value, slope)``:
``value`` sums to the divergence, and ``slope`` is the derivative of that sum by ``log_q``, up to a
multiple of q. That freedom costs nothing, because the gradient by the logits,
``slope - q * slope.sum()``, does not see it; it is used here to keep small differences small. Near
convergence ``p (log p - log q)`` cancels between entries, so KL's value is written as
``p (e^d - 1 - d)`` with ``d = log q - log p``: never negative, and exact for small d. The two terms
of Jensen-Shannon cancel within an entry, which loses nothing.

``beta`` follows TRL and Liger: 0 is KL(p || q), 1 is KL(q || p), between is the generalised
Jensen-Shannon divergence with the mixture m = beta p + (1 - beta) q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .problem import SparseTarget

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Below this |d| the series of e^d - 1 - d is exact to fp32; above it the plain form does not
# cancel.
SMALL = 0.5
# A teacher that gives the student's most probable entry e^-RULED_OUT of the student's probability.
RULED_OUT = 1.0
# Where p / q would exceed e^FAR, q / m is taken from p's side: nothing overflows.
FAR = 30.0


class LogitTransform(NamedTuple):
    """``z = softcap * tanh(logit_scale * (W h + b) / softcap) / temperature``; no cap where None.

    ``softcap`` is Gemma 2's final_logit_softcapping, ``logit_scale`` is Cohere's factor (Granite
    divides by logits_scaling), ``temperature`` flattens the softmax of student and teacher alike.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0

    def __call__(self, raw: Tensor) -> Tensor:
        z = raw * self.logit_scale
        if self.softcap is not None:
            z = self.softcap * (z / self.softcap).tanh()
        return z / self.temperature

    def slope(self, z: Tensor) -> Tensor | float:
        """dz / draw, from the finished logit ``z``."""
        linear = self.logit_scale / self.temperature
        if self.softcap is None:
            return linear
        return linear * (1 - (z * (self.temperature / self.softcap)) ** 2)


IDENTITY = LogitTransform()


def excess(d: Tensor) -> Tensor:
    """e^d - 1 - d for |d| <= SMALL, by its Taylor series."""
    series = torch.full_like(d, 1 / 3628800)
    for denominator in (362880, 40320, 5040, 720, 120, 24, 6, 2):
        series = series * d + 1 / denominator
    return series * d * d


def times(p: Tensor, x: Tensor) -> Tensor:
    """p * x, where an entry without probability contributes nothing even if x is infinite."""
    return torch.where(p == 0, 0.0, p * x)


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q). Slope -p, shifted by q: it sums to zero."""
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    value = torch.where(d.abs() < SMALL, p * excess(d), q - p - times(p, d))
    return value, q - p


def at_peak(x: Tensor, q: Tensor) -> Tensor:
    """x at the student's most probable entry.    x, q [..., V] -> [..., 1]"""
    return x.gather(-1, q.argmax(-1, keepdim=True))


def from_rate(q: Tensor, rate: Tensor) -> Tensor:
    """The slope q * rate, shifted by the rate of the student's most probable entry.

    Without the shift a confident student's gradient would be a difference of large numbers.
    """
    return times(q, rate - at_peak(rate, q))


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p). Slope q (log q - log p) + q."""
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    value = torch.where(d.abs() < SMALL, q * excess(-d), p - q + times(q, d))
    return value, from_rate(q, d)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m). Slope (1 - beta) q log(q / m)."""
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    ratio = torch.exp(-d.clamp(min=-FAR))  # p / q
    less = beta * torch.expm1(-d.clamp(min=-FAR))  # m / q - 1
    m_over_q = torch.where(less < -0.5, torch.log((1 - beta) + beta * ratio), torch.log1p(less))
    m_over_p = torch.log(beta + (1 - beta) * d.exp())
    near = d > -FAR
    q_over_m = torch.where(near, -m_over_q, d - m_over_p)
    p_over_m = torch.where(near, q_over_m - d, -m_over_p)
    value = beta * times(p, p_over_m) + (1 - beta) * times(q, q_over_m)
    # Where the teacher rules out the student's peak, q / m is 1 / (1 - beta) there but for a small
    # number. Without that constant the rate is the small number itself.
    constant = math.log1p(-beta)
    without = torch.where(near, -torch.log1p(beta / (1 - beta) * ratio), q_over_m + constant)
    rate = torch.where(at_peak(d, q) > RULED_OUT, without, q_over_m)
    return value, from_rate(q, (1 - beta) * rate)


def divergence(beta: float) -> Divergence:
    """The divergence that ``beta`` names."""
    if beta == 0.0:
        return forward_kl
    if beta == 1.0:
        return reverse_kl
    return partial(jensen_shannon, beta=beta)


# Row kernels: the logits of a chunk in, loss and gradient by the logits out. They have these names
# in the other languages too. C rows, V vocabulary, all fp32; a row never looks at another row.


def sparse_target_rows(z: Tensor, target: SparseTarget) -> tuple[Tensor, Tensor]:
    """Cross-entropy against a target distribution t that is spread evenly but for a few entries.

    z [C, V], target over [C] -> loss [C] = lse - sum of t_v z_v over all but the tail,
    dz [C, V] = q - t without the tail.

    With o = logsumexp over all entries but the target, -log q_target = softplus(o - z_target) and
    1 - q_target = sigmoid(o - z_target): a confident row keeps its relative accuracy, where
    lse - z_target and q_target - 1 would cancel.
    """
    smoothing = target.smoothing or 0.0
    uniform = smoothing / z.shape[-1]
    ids = target.ids.unsqueeze(-1)
    # one number a row, in double: fp32 functions may round another way where rows are few
    z_target = z.gather(-1, ids).double()
    other_z = z.scatter(-1, ids, -torch.inf)
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
    if target.more is not None and target.masses is not None:
        tail, more = target.masses[:, :1].double(), target.masses[:, 1:]
        entries = torch.where(more > 0, target.more, ids)
        rest += tail + more.sum(-1, keepdim=True, dtype=torch.float64)
        # all measured from z_target: what p is sure of is exact
        terms = torch.where(more > 0, more * (z.gather(-1, entries) - z_target), 0.0)
        loss += tail * z_target - terms.sum(-1, keepdim=True)
        loss = torch.where(z_target == -torch.inf, odds, loss)
        dz.scatter_add_(-1, entries, -more)
    dz.scatter_(-1, ids, (rest - odds.sigmoid()).float())
    return loss.squeeze(-1).float(), dz.sub_(uniform) if uniform else dz


def divergence_rows(z: Tensor, z_teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Divergence between teacher and student.    z, z_teacher [C, V] -> loss [C], dz [C, V]"""
    log_q = z.log_softmax(dim=-1)
    log_p = z_teacher.log_softmax(dim=-1)
    value, slope = divergence(beta)(log_p, log_q)
    dz = torch.addcmul(slope, log_q.exp(), slope.sum(-1, keepdim=True), value=-1)
    return value.sum(-1), dz
