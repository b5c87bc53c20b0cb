"""What is timed: losses over the heads of real models, on random tensors that look like a model's.

Legend: T tokens, D hidden width, V vocabulary. A *pass* is one product of T x D with the head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from cases import DTYPES, LOSSES, Shape
from device import DEVICE, seconds
from torch import Tensor

import softprompt_fast as spf

reference = spf.reference
DTYPE = getattr(torch, DTYPES[DEVICE.type])
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


class Tensors(NamedTuple):
    hidden: Tensor  # [T, D], requires grad
    teacher: Tensor  # [T, D]
    targets: Tensor  # [T]
    weight: Tensor  # [V, D], frozen

    @classmethod
    def random(
        cls, shape: Sizes, different: int | None = None, dtype: torch.dtype = DTYPE
    ) -> Tensors:
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

    def contract(self, dtype: torch.dtype) -> float:
        """docs/losses.md: the relative error that a gradient of these rows may have."""
        with torch.no_grad():
            z = reference.logits(torch.cat((self.hidden, self.teacher)), self.weight)
        return UNIT[dtype] + 8 * U32 * (1 + float(z.abs().max() + z.logsumexp(-1).abs().max()))


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
    """fp64 gradients of some tokens, as if the loss were their mean, and what may be missed."""

    index: Tensor
    gradient: Tensor
    bound: float

    def check(self, found: Tensor) -> float:
        """Relative L2 distance of those tokens' gradients in a mean over all tokens.

        Raises AssertionError if it is above the bound: what is wrong must not be timed.
        """
        here = found[self.index].double() * (len(found) / len(self.index))
        error = float((here - self.gradient).norm() / self.gradient.norm())
        assert error <= self.bound, (
            f"wrong gradient: relative error {error:.2g}, bound {self.bound:.2g}"
        )
        return error


@lru_cache(maxsize=1)
def tensors_of(shape: Shape) -> Tensors:
    """The same for every implementation; nothing writes to them."""
    return Tensors.random(shape)


class Sample(NamedTuple):
    index: Tensor
    tensors: Tensors  # fp64
    bound: float


@lru_cache(maxsize=1)
def sample_of(shape: Shape) -> Sample:
    """The bound is ten times the contract of docs/losses.md: ours are far below it, and a peer that
    rounds more than we do is shown with its error, not refused."""
    index = torch.linspace(0, shape.T - 1, min(CHECKED_ROWS, shape.T)).long().to(DEVICE)
    rows = tensors_of(shape).rows(index)
    return Sample(index, rows, 10 * rows.contract(DTYPE))


@cache
def exact(problem: str, shape: Shape) -> Exact:
    sample = sample_of(shape)
    return Exact(sample.index, gradient(PROBLEMS[problem].oracle, sample.tensors), sample.bound)


class BarePasses:
    """Times of the products that a loss cannot avoid: logits, and their gradient back.

    In pieces of rows where fp32 logits would fill the memory.
    """

    BYTES = 8 * 2**30

    def __init__(self, t: Tensors) -> None:
        self.hidden, self.weight = t.hidden.detach(), t.weight
        V, D = self.weight.shape
        self.piece = min(len(self.hidden), max(128, self.BYTES // (4 * V) // 128 * 128))
        self.logits = torch.zeros(self.piece, V, device=DEVICE)
        self.dz = self.logits
        if t.weight.dtype != torch.float32:  # a product with zeros takes less power, and less time
            self.dz = torch.empty_like(self.logits, dtype=t.weight.dtype).normal_()
        self.dh = torch.zeros(self.piece, D, device=DEVICE)
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
            mm(rows, self.weight.T, self.logits[: len(rows)])

    def multiply_back(self) -> None:
        for rows in self.hidden.split(self.piece):
            mm(self.dz[: len(rows)], self.weight, self.dh[: len(rows)])


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """fp32 results, whatever the inputs are. PyTorch has no such product of 16 bits on a CPU."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)
