"""The formulas of the Triton kernels, one vocabulary entry at a time.

The same mathematics as ``softprompt_fast/backends/formulas.py``, where its choices are explained. A
function is elementwise, for a scalar, a row's block or a tile, unless it gives its shapes.

Legend: z finished logit, p teacher, q student, d = log q - log p, m the mixture beta p + rest q
with rest = 1 - beta. For targets and masses see ``softprompt_fast/backends/problem.py``, for
arguments that are tuples ``arguments.py``.
"""

from typing import Any

import triton
import triton.language as tl

from .arguments import Label

# Below this |d| the series of e^d - 1 - d is exact to fp32.
SMALL = tl.constexpr(0.5)
# A teacher that gives the student's most probable entry e^-RULED_OUT of the student's probability.
RULED_OUT = tl.constexpr(1.0)
# Where p / q would exceed e^FAR, q / m is taken from p's side: nothing overflows.
FAR = tl.constexpr(30.0)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def excess(d):
    """e^d - 1 - d for |d| <= SMALL, by its Taylor series."""
    series = d * (1 / 3628800) + 1 / 362880
    series = series * d + 1 / 40320
    series = series * d + 1 / 5040
    series = series * d + 1 / 720
    series = series * d + 1 / 120
    series = series * d + 1 / 24
    series = series * d + 1 / 6
    series = series * d + 1 / 2
    return series * d * d


@triton.jit
def expm1(x):
    return tl.where(tl.abs(x) < SMALL, excess(x) + x, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """What 1 + x loses to rounding is put back as a factor (Kahan)."""
    u = 1 + x
    rounded = u - 1
    return tl.where(rounded == 0, x, tl.log(u) * (x / tl.where(rounded == 0, 1.0, rounded)))


@triton.jit
def tanh(x):
    e = expm1(-2 * tl.abs(x))
    magnitude = -e / (e + 2)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def finish(raw, bias, transform):
    """The logit that the softmax sees: scale (raw + bias), or cap tanh(scale (raw + bias)).

    scale is logit_scale / temperature, or logit_scale / softcap under a cap of softcap /
    temperature. bias and cap may be None.
    """
    if bias is not None:
        raw += bias.to(tl.float32)
    z = raw * transform.scale
    if transform.cap is not None:
        z = transform.cap * tanh(z)
    return z


@triton.jit
def chain(dz, z, slope, cap):
    """From the gradient by z to the gradient by the raw product. slope: dz / draw at z = 0."""
    if cap is not None:
        t = z / cap
        slope = slope * (1 - t * t)
    return dz * slope


@triton.jit
def times(p, x):
    """p * x, where an entry without probability contributes nothing even if x is infinite."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def forward_kl(log_p, log_q, d_peak, mixture):
    """KL(p || q). Slope -p, shifted by q: it sums to zero."""
    p, q, d = tl.exp(log_p), tl.exp(log_q), log_q - log_p
    value = tl.where(tl.abs(d) < SMALL, p * excess(d), q - p - times(p, d))
    return value, q - p


@triton.jit
def reverse_kl(log_p, log_q, d_peak, mixture):
    """KL(q || p). Slope q (d - d_peak), d_peak the student's most probable entry's d."""
    p, q, d = tl.exp(log_p), tl.exp(log_q), log_q - log_p
    value = tl.where(tl.abs(d) < SMALL, q * excess(-d), p - q + times(q, d))
    return value, times(q, d - d_peak)


@triton.jit
def jensen_shannon(log_p, log_q, d_peak, mixture):
    """beta KL(p || m) + rest KL(q || m). Slope rest q (log(q / m) - log(q / m) at the peak)."""
    ruled_out = d_peak > RULED_OUT
    peak_rate, _, _ = over_mixture(d_peak, ruled_out, mixture)
    rate, p_over_m, q_over_m = over_mixture(log_q - log_p, ruled_out, mixture)
    p, q = tl.exp(log_p), tl.exp(log_q)
    value = mixture.beta * times(p, p_over_m) + mixture.rest * times(q, q_over_m)
    return value, mixture.rest * times(q, rate - peak_rate)


@triton.jit
def over_mixture(d, ruled_out, mixture):
    """(rate, log(p / m), log(q / m)); rate is log(q / m), or log(rest q / m) where ruled out.

    Where the teacher rules out the student's peak, the latter is the small number there.
    """
    beta, rest = mixture.beta, mixture.rest
    log_ratio = tl.minimum(-d, FAR)
    ratio = tl.exp(log_ratio)  # p / q
    above = tl.where(ruled_out, beta / rest * ratio, beta * expm1(log_ratio))  # m / q - 1
    m_over_q = tl.where(above < -0.5, tl.log(rest + beta * ratio), log1p(above))
    m_over_p = tl.log(beta + rest * tl.exp(d))
    near = d > -FAR
    constant = tl.where(ruled_out, mixture.log_rest, 0.0)
    rate = tl.where(near, -m_over_q, d - m_over_p + constant)
    q_over_m = rate - constant
    return rate, tl.where(near, q_over_m - d, -m_over_p), q_over_m


@triton.jit
def add_entry(top, total, others, z, is_other):
    """A running softmax with one more entry: top = max z, total = sum of e^(z - top).

    others: the part of total that is not the target's, so that 1 - q_target is never a difference.
    """
    e = tl.where(z == MINUS_INFINITY, 0.0, tl.exp(-tl.abs(z - top)))
    rises = z > top
    total = tl.where(rises, total * e + 1, total + e)
    others = tl.where(rises, others * e + is_other, others + e * is_other)
    return tl.maximum(top, z), total, others


@triton.jit
def finite_top(top):
    """What may be subtracted from logits whose maximum is ``top``: not -inf."""
    return tl.where(top == MINUS_INFINITY, 0.0, top)


@triton.jit
def merge(top, total, others):
    """Running softmaxes side by side as one.    [N] -> [1]"""
    largest = tl.max(top, 0, keep_dims=True)
    factor = tl.exp(top - finite_top(largest))
    total = tl.sum(total * factor, 0, keep_dims=True)
    return largest, total, tl.sum(others * factor, 0, keep_dims=True)


@triton.jit
def log_likelihood(top, total, others, z_target):
    """log(total), -log q_target and 1 - q_target of a row.

    NaN where the row has no finite normaliser, or its target is NaN: outside the vocabulary.
    """
    log_sum = tl.where(z_target == z_target, tl.log(total), float("nan"))
    lse = top + log_sum
    odds = (top - z_target) + tl.log(others) + (lse - lse)  # of all others against the target
    e = tl.exp(-tl.abs(odds))
    nll = tl.maximum(odds, 0.0) + log1p(e)
    return log_sum, nll, tl.where(odds > 0, 1 / (1 + e), e / (1 + e))


@triton.jit
def label_loss(top, total, others, sum_z, z_label, target, V):
    """log(total), the cross-entropy with the label, perhaps smoothed, and its slope's numbers."""
    log_sum, nll, missing = log_likelihood(top, total, others, z_label)
    lse = top + log_sum
    elsewhere = tl.zeros([1], tl.float32)
    if target.smoothing is not None:
        nll = (1 - target.smoothing) * nll + target.smoothing * (lse - sum_z / V)
        elsewhere += target.smoothing
    return log_sum, nll, Label(lse, missing, elsewhere)


@triton.jit
def nll_slope(log_q, is_label, mass, label, target, V):
    """d nll / dz of entries, one of them the label, the others with this mass.

    At the label q - (1 - elsewhere) comes as elsewhere - missing.
    """
    uniform = even_share(target, V)
    at_label = (label.elsewhere - uniform) - label.missing
    return tl.where(is_label, at_label, (tl.exp(log_q) - mass) - uniform)


@triton.jit
def even_share(target, V):
    """What every entry of the vocabulary has of the smoothing."""
    share = 0.0
    if target.smoothing is not None:
        share = target.smoothing / V
    return share


@triton.jit
def nll_bound(label):
    """What no |d nll / dz| exceeds: what the student, or the target, leaves to others."""
    return tl.maximum(label.missing, label.elsewhere)


@triton.jit
def load_masses(masses, row, K, ENTRIES: tl.constexpr):
    """The tail's mass, those of the more targets [ENTRIES], 0 beyond K, and the sum of all."""
    entries = tl.arange(0, ENTRIES)
    masses += row * (1 + K)
    tail = tl.load(masses)
    mass = tl.load(masses + 1 + entries, mask=entries < K, other=0.0)
    return tail, mass, tail + tl.sum(mass, 0)


@triton.jit
def known(z_target, mass, z):
    """z_target, or NaN where an entry with mass is NaN: outside the vocabulary.    mass, z [N]"""
    unknown = tl.where((mass > 0) & (z != z), 1, 0)
    return tl.where(tl.sum(unknown, 0) > 0, float("nan"), z_target)


@triton.jit
def spread(nll, z_target, tail, mass, z):
    """Cross-entropy with a part of the target's 1 on the tail and on more entries.    mass, z [N]

    All measured from z_target: what p is sure of is exact.
    """
    terms = tl.where(mass > 0, mass * (z - z_target), 0.0)
    more = tail * z_target - tl.sum(terms, 0)
    return tl.where(z_target == MINUS_INFINITY, nll, nll + more)


@triton.jit
def power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fp16_exponent(bound):
    """The power of two that lifts numbers up to ``bound`` into the upper half of fp16's range."""
    bound = tl.where(bound > 0, bound, 1.0)  # NaN, or a row that counts nothing
    exponent = 13 - tl.floor(tl.log2(bound))
    return tl.minimum(tl.maximum(exponent, -100.0), 100.0).to(tl.int32)


def divergence_of(beta: float) -> Any:
    """The formula that ``beta`` names."""
    return {0.0: forward_kl, 1.0: reverse_kl}.get(beta, jensen_shannon)
