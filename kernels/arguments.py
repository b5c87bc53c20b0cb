"""Arguments of the kernels that belong together.

Triton takes a tuple apart when it compiles: a field is a pointer, a number, or None, for what is
not asked for; then the kernel has no code for it. Ask the field, not the tuple, whether it is None:
Triton 3.6 cannot compare a tuple that holds a None, nor return one from a function.

A target is the ``SparseTarget`` of ``softprompt_fast/backends/problem.py``.

Legend: C rows in a chunk, T tokens, D hidden width, V vocabulary, K more targets.
"""

import math
from typing import Any, NamedTuple


class Transform(NamedTuple):
    """From a raw product to a logit, see ``finish``; back, see ``chain``."""

    scale: float
    cap: float | None
    slope: float

    @classmethod
    def of(cls, transform: Any) -> "Transform":
        """Of a ``LogitTransform``."""
        softcap, logit_scale, temperature = transform
        slope = logit_scale / temperature
        if softcap is None:
            return cls(slope, None, slope)
        return cls(logit_scale / softcap, softcap / temperature, slope)


class Mixture(NamedTuple):
    """m = beta p + rest q, of teacher p and student q."""

    beta: float
    rest: float
    log_rest: float

    @classmethod
    def of(cls, beta: float) -> "Mixture":
        """From double: rest keeps its digits."""
        return cls(beta, 1 - beta, math.log1p(-beta) if beta < 1 else -math.inf)


class Weights(NamedTuple):
    """loss = divergence * KL or its like + nll * cross-entropy."""

    divergence: float
    nll: float

    @classmethod
    def of(cls, alpha: float) -> "Weights":
        return cls(alpha, 1 - alpha)


class Logits(NamedTuple):
    """Rows of raw products with a head."""

    raw: Any  # [C, V] fp32
    stride: int
    bias: Any  # [V]


class Gradient(NamedTuple):
    """Rows of the gradient by the raw products, written."""

    dz: Any = None  # [C, V]
    stride: int = 0
    unscale: Any = None  # [C] fp32: dz * unscale is the gradient

    @classmethod
    def of(cls, dz: Any, unscale: Any) -> "Gradient":
        return cls() if dz is None else cls(dz, dz.stride(0), unscale)


class Label(NamedTuple):
    """What the slope of a row's cross-entropy is made of."""

    lse: Any  # [1], log of the sum of e^z
    missing: Any  # [1], 1 - q of the label
    elsewhere: Any  # [1], what the target leaves to others


class Stream(NamedTuple):
    """Hidden states and the head that makes logits of them."""

    hidden: Any = None  # [T, D]
    weight: Any = None  # [V, D]
    bias: Any = None  # [V]
    D: int = 0


class Parts(NamedTuple):
    """The running softmax of a stream in every part of the vocabulary."""

    tops: Any = None  # [PARTS, T]
    totals: Any = None  # [PARTS, T]
    others: Any = None  # [PARTS, T], the totals without the target
    sums_z: Any = None  # [PARTS, T]
    peaks: Any = None  # [PARTS, T] int32, the most probable entry
    z_targets: Any = None  # [T]


class Sums(NamedTuple):
    """What a divergence sums up in every part of the vocabulary."""

    value: Any = None  # [PARTS, T]
    slope: Any = None  # [PARTS, T]
    largest: Any = None  # [PARTS, T], of |slope|


class Strip(NamedTuple):
    """dz of some columns of the vocabulary."""

    dz: Any  # [T, width]
    first: int
    width: int


def entry_numbers(target: Any) -> tuple[int, int]:
    """K, and a power of two that holds as many entries."""
    K = 0 if target.more is None else target.more.shape[1]
    return K, 1 << max(K - 1, 0).bit_length()
