"""The losses to be timed, each as a function of one set of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import softprompt_fast as spf


@dataclass(kw_only=True, frozen=True)
class Shape:
    """T tokens, D hidden width, V vocabulary."""

    model: str
    T: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"{self.model} T={self.T} D={self.D} V={self.V}"


SHAPES = [
    Shape(model="SmolLM2-135M", T=1024, D=576, V=49152),
    Shape(model="SmolLM2-135M", T=64, D=576, V=49152),
    Shape(model="Gemma-3-1B", T=128, D=1152, V=262144),
]


class Tensors(NamedTuple):
    hidden: Tensor  # [T, D], requires grad
    teacher: Tensor  # [T, D]
    targets: Tensor  # [T]
    weight: Tensor  # [V, D]
    sketch: spf.TeacherSketch | None = None

    @classmethod
    def random(cls, shape: Shape) -> Tensors:
        """As a model has them: logits of standard deviation 2, a teacher near the student."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(shape.T, shape.D, generator=generator)
        return cls(
            hidden.clone().requires_grad_(),
            hidden + 0.3 * torch.randn(shape.T, shape.D, generator=generator),
            torch.randint(0, shape.V, (shape.T,), generator=generator),
            torch.randn(shape.V, shape.D, generator=generator) * (2 * shape.D**-0.5),
        )

    def first(self, rows: int, dtype: torch.dtype) -> Tensors:
        """The first ``rows`` tokens, in another dtype."""
        return Tensors(
            self.hidden.detach()[:rows].to(dtype).requires_grad_(),
            self.teacher[:rows].to(dtype),
            self.targets[:rows],
            self.weight.to(dtype),
        )

    def sketched(self) -> Tensors:
        """With the teacher's sketch, which a training run makes once."""
        return self._replace(sketch=spf.sketch_teacher(self.teacher, self.weight))


Loss = Callable[[Tensors], Tensor]


def materialised_kl(t: Tensors) -> Tensor:
    with torch.no_grad():
        log_p = F.linear(t.teacher, t.weight).log_softmax(-1)
    log_q = F.linear(t.hidden, t.weight).log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def trl_kl(t: Tensors) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        t.hidden, t.weight, None, t.teacher, t.weight, None, 0.0
    )
    return divergence.mean()


class Comparison(NamedTuple):
    """Implementations of one loss, its fp64 oracle, and the passes that it cannot avoid."""

    passes: int
    oracle: Loss
    implementations: dict[str, Loss]
    sketched: bool = False

    def tensors(self, shape: Shape) -> Tensors:
        tensors = Tensors.random(shape)
        return tensors.sketched() if self.sketched else tensors


COMPARISONS = {
    "NLL": Comparison(
        2,
        lambda t: spf.reference.linear_nll(t.hidden, t.weight, t.targets),
        {
            "softprompt_fast": lambda t: spf.linear_nll(t.hidden, t.weight, t.targets),
            "PyTorch": lambda t: F.cross_entropy(F.linear(t.hidden, t.weight), t.targets),
        },
    ),
    "KL": Comparison(
        3,
        lambda t: spf.reference.linear_kl(t.hidden, t.weight, t.teacher),
        {
            "softprompt_fast": lambda t: spf.linear_kl(t.hidden, t.weight, t.teacher),
            "PyTorch": materialised_kl,
            **({"TRL": trl_kl} if find_spec("trl") else {}),
        },
    ),
    "KL, sketch": Comparison(
        2,
        lambda t: spf.reference.linear_kl(t.hidden, t.weight, t.teacher),
        {"softprompt_fast": lambda t: spf.linear_kl(t.hidden, t.weight, t.sketch)},
        sketched=True,
    ),
}


def gradient(loss: Loss, t: Tensors) -> Tensor:
    """One step: forward, backward, and the gradient by the hidden states."""
    t.hidden.grad = None
    loss(t).backward()
    assert t.hidden.grad is not None
    return t.hidden.grad
