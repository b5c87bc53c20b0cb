"""What is timed: losses over the heads of real models, on random tensors that look like a model's.

Legend: T tokens, D hidden width, V vocabulary. A *pass* is one product of T x D with the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from cases import LOSSES, Shape
from device import DEVICE, ON_GPU, seconds
from torch import Tensor

import softprompt_fast as spf

reference = spf.reference
UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}
U32 = 2.0**-24
CHECKED_ROWS = 8


class Sizes(Protocol):
    """T tokens of D numbers, V entries."""

    @property
    def T(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def V(self) -> int: ...


class Bounds(NamedTuple):
    """Relative L2 errors that a gradient may have: above them it is wrong, not rounded."""

    contract: float
    """ours, docs/losses.md: the rounding of the gradient itself, and fp32 logits"""

    rounded_logits: float
    """a peer that rounds logits, or log-probabilities, to the dtype: its error is shown. What is
    wrong in its formula is seen in fp32, where this is ten times the contract."""


class Tensors(NamedTuple):
    hidden: Tensor  # [T, D], requires grad
    teacher: Tensor  # [T, D]
    targets: Tensor  # [T]
    weight: Tensor  # [V, D], frozen

    @classmethod
    def random(cls, shape: Sizes, dtype: torch.dtype, different: int | None = None) -> Tensors:
        """Logits of standard deviation 2, a teacher near the student.

        different: so many rows of the head, over and over: made in less time, where only the size
        of things is looked at.
        """
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*size: int, std: float = 1.0) -> Tensor:
            return torch.empty(size, dtype=dtype, device=DEVICE).normal_(
                std=std, generator=generator
            )

        hidden = normal(shape.T, shape.D)
        teacher = hidden + normal(shape.T, shape.D, std=0.3)
        targets = torch.randint(shape.V, (shape.T,), generator=generator, device=DEVICE)
        rows = min(shape.V, different or shape.V)
        weight = normal(rows, shape.D, std=2 * shape.D**-0.5)
        if rows < shape.V:
            weight = weight.repeat(-(-shape.V // rows), 1)[: shape.V]
        return cls(hidden.requires_grad_(), teacher, targets, weight)

    def rows(self, index: Tensor) -> Tensors:
        """Some of the tokens, in fp64."""
        return Tensors(
            self.hidden.detach()[index].double().requires_grad_(),
            self.teacher[index].double(),
            self.targets[index],
            self.weight.double(),
        )

    def bounds(self, dtype: torch.dtype) -> Bounds:
        """Of a gradient of these rows in ``dtype``."""
        with torch.no_grad():
            z = reference.logits(torch.cat((self.hidden, self.teacher)), self.weight)
        growth = 1 + float(z.abs().max() + z.logsumexp(-1).abs().max())
        unit, fp32 = UNIT[dtype], 8 * U32 * growth
        return Bounds(unit + fp32, unit * growth + 10 * fp32)


Loss = Callable[[Tensors], Tensor]


class Problem(NamedTuple):
    """A loss, averaged over the tokens: its oracle, and the passes that it cannot avoid."""

    passes: int
    oracle: Loss


def _problem(name: str) -> Problem:
    function, options, passes = LOSSES[name]
    loss = getattr(reference, function)

    def oracle(t: Tensors) -> Tensor:
        others = {
            "linear_nll": (t.targets,),
            "linear_kl": (t.teacher,),
            "linear_distill": (t.targets, t.teacher),
        }
        return loss(t.hidden, t.weight, *others[function], **options)

    return Problem(passes, oracle)


PROBLEMS = {name: _problem(name) for name in LOSSES}


def gradient(loss: Loss, t: Tensors) -> Tensor:
    """One step: forward, backward, and the gradient by the hidden states."""
    return torch.autograd.grad(loss(t), t.hidden)[0]


class Exact(NamedTuple):
    """fp64 gradients of some tokens, as if the loss were their mean."""

    index: Tensor
    gradient: Tensor
    bounds: Bounds

    def check(self, found: Tensor, bound: float) -> float:
        """Relative L2 distance of those tokens' gradients in a mean over all tokens.

        Raises AssertionError if it is above the bound: what is wrong must not be timed.
        """
        here = found[self.index].double() * (len(found) / len(self.index))
        error = float((here - self.gradient).norm() / self.gradient.norm())
        assert error <= bound, f"wrong gradient: relative error {error:.2g}, bound {bound:.2g}"
        return error


@lru_cache(maxsize=1)
def tensors_of(shape: Shape, dtype: torch.dtype) -> Tensors:
    """The same for every implementation; nothing writes to them."""
    return Tensors.random(shape, dtype)


class Sample(NamedTuple):
    index: Tensor
    tensors: Tensors  # fp64
    bounds: Bounds


@lru_cache(maxsize=1)
def sample_of(shape: Shape, dtype: torch.dtype) -> Sample:
    index = torch.linspace(0, shape.T - 1, min(CHECKED_ROWS, shape.T)).long().to(DEVICE)
    rows = tensors_of(shape, dtype).rows(index)
    return Sample(index, rows, rows.bounds(dtype))


@cache
def exact(problem: str, shape: Shape, dtype: torch.dtype) -> Exact:
    sample = sample_of(shape, dtype)
    return Exact(sample.index, gradient(PROBLEMS[problem].oracle, sample.tensors), sample.bounds)


class BarePasses:
    """Times of the products that a loss cannot avoid: logits, and their gradient back.

    In pieces of rows where fp32 logits would fill the memory. Where products of 16 bits are
    emulated, a block of the head after the other is converted to fp32 and multiplied: that is the
    faster one, so it is what nothing can avoid.
    """

    BYTES = 8 * 2**30
    BLOCK = 4096

    def __init__(self, t: Tensors) -> None:
        self.hidden, self.weight = t.hidden.detach(), t.weight
        V, D = self.weight.shape
        dtype = self.weight.dtype
        self.converted = emulates(dtype)
        result = torch.float32 if self.converted else product_dtype(dtype)
        self.piece = min(len(self.hidden), max(128, self.BYTES // (4 * V) // 128 * 128))
        self.logits = torch.zeros(self.piece, V, dtype=result, device=DEVICE)
        self.dz = self.logits
        if dtype != torch.float32:  # a product with zeros takes less power, and less time
            self.dz = torch.empty_like(self.logits, dtype=dtype).normal_()
        self.dh = torch.zeros(self.piece, D, dtype=result, device=DEVICE)
        self.seconds: dict[str, list[float]] = {"logits": [], "gradient": []}

    def __call__(self) -> None:
        for name, product in (("logits", self.multiply), ("gradient", self.multiply_back)):
            self.seconds[name].append(seconds(product))

    def floor_seconds(self, passes: int) -> list[float]:
        """Of every round: a product back, and as many for logits as are left."""
        pairs = zip(self.seconds["logits"], self.seconds["gradient"], strict=True)
        return [(passes - 1) * logits + gradient for logits, gradient in pairs]

    def multiply(self) -> None:
        for rows in self.hidden.split(self.piece):
            logits = self.logits[: len(rows)]
            if self.converted:
                blocks = zip(
                    self.weight.split(self.BLOCK), logits.split(self.BLOCK, dim=1), strict=True
                )
                for weight, out in blocks:
                    mm(rows.float(), weight.float().T, out)
            else:
                mm(rows, self.weight.T, logits)

    def multiply_back(self) -> None:
        for rows in self.hidden.split(self.piece):
            dz, dh = self.dz[: len(rows)], self.dh[: len(rows)]
            if self.converted:
                dh.zero_()
                blocks = zip(
                    self.weight.split(self.BLOCK), dz.split(self.BLOCK, dim=1), strict=True
                )
                for weight, some in blocks:
                    dh.addmm_(some.float(), weight.float())
            else:
                mm(dz, self.weight, dh)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of ``mm``'s results: PyTorch has no product of 16 bits with fp32 results on a CPU."""
    return torch.float32 if ON_GPU else dtype


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    if a.is_cuda and a.dtype != torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out=out)


@cache
def emulates(dtype: torch.dtype) -> bool:
    """Does the device multiply ``dtype`` more slowly than fp32 copies of it?

    True of 16 bits on a CPU without AVX512, for which PyTorch has plain loops.
    """
    if ON_GPU or dtype == torch.float32:
        return False
    dz, weight = torch.ones(16, 4096, dtype=dtype), torch.ones(4096, 512, dtype=dtype)

    def best(product: Callable[[], Tensor]) -> float:
        return min(seconds(product) for _ in range(3))

    return best(lambda: dz @ weight) > best(lambda: dz.float() @ weight.float())


@lru_cache(maxsize=1)
def emulated_product_seconds(shape: Shape, dtype: torch.dtype) -> float:
    """About how long PyTorch's product back takes in plain loops; 0 where it has better.

    From two of the rows and an eighth of the head: time is in proportion to both.
    """
    if not emulates(dtype):
        return 0.0
    weight = tensors_of(shape, dtype).weight[: shape.V // 8]
    dz = torch.ones(2, len(weight), dtype=dtype)
    return seconds(lambda: dz @ weight) * shape.T / 2 * 8
