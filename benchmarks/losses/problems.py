"""What is timed: losses over the heads of real models, on random tensors that look like a model's.

Legend: T tokens, D hidden width, V vocabulary. A *pass* is one product of T x D with the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch
from device import DEVICE, ON_GPU, seconds
from torch import Tensor

import softprompt_fast as spf

reference = spf.reference
# As models are trained on the device: 16 bits on a GPU, 32 where those are only emulated.
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
UNIT = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}
U32 = 2.0**-24
CHECKED_ROWS = 8

HEADS = {
    "SmolLM2-135M": (576, 49152),
    "Qwen2.5-0.5B": (896, 151936),
    "Llama-3.2-1B": (2048, 128256),
    "Gemma-3-1B": (1152, 262144),
    "Llama-3-8B": (4096, 128256),
}


class Sizes(Protocol):
    """T tokens of D numbers, V entries."""

    @property
    def T(self) -> int: ...
    @property
    def D(self) -> int: ...
    @property
    def V(self) -> int: ...


@dataclass(kw_only=True, frozen=True)
class Shape:
    model: str
    T: int
    D: int
    V: int

    @classmethod
    def of(cls, model: str, T: int) -> Shape:
        D, V = HEADS[model]
        return cls(model=model, T=T, D=D, V=V)

    @property
    def pass_flop(self) -> float:
        return 2.0 * self.T * self.D * self.V

    def __str__(self) -> str:
        return f"{self.model} T={self.T} D={self.D} V={self.V}"


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


def _kl(beta: float) -> Loss:
    return lambda t: reference.linear_kl(t.hidden, t.weight, t.teacher, beta=beta)


PROBLEMS = {
    "NLL": Problem(2, lambda t: reference.linear_nll(t.hidden, t.weight, t.targets)),
    "KL": Problem(3, _kl(0.0)),
    # What is known of the teacher was computed before, in the form that the implementation takes.
    "KL, stored teacher": Problem(2, _kl(0.0)),
    "reverse KL": Problem(3, _kl(1.0)),
    "JSD": Problem(3, _kl(0.5)),
    "KL + NLL": Problem(
        3, lambda t: reference.linear_distill(t.hidden, t.weight, t.targets, t.teacher, alpha=0.5)
    ),
}
MAIN = ["NLL", "KL", "KL, stored teacher"]


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
