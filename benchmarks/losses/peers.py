"""Who is compared: every implementation, called as its documentation says is best.

All get the same ``Tensors`` and return the mean over the tokens; the head is frozen. To run one
line again: ``pytest benchmarks/losses/bench_losses.py -k "bf16 and SmolLM2 and T16 and TRL"``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from device import ON_GPU
from losses.problems import Loss, Tensors
from torch import Tensor

import softprompt_fast as spf

# Given the tensors, what does not change between steps is prepared; then every step is one call.
Prepare = Callable[[Tensors], Loss]
# Vocabulary entries of a tile, and rows of a chunk: see where they are used.
TRL_TILE, ROWS = 32768, 256


@dataclass(kw_only=True, frozen=True)
class Peer:
    losses: dict[str, Prepare]

    package: str | None = None
    """to be imported; its version is pinned in the extra ``bench`` of pyproject.toml"""

    why_absent: str | None = None
    """why that extra does not have it"""

    needs_gpu: str | None = None
    """what of it runs on a GPU only"""

    needs: Callable[[], str | None] = lambda: None
    """another reason why it cannot run here"""

    torch_product_back: bool = False
    """Its last product is PyTorch's own of dz [T, V] and the head [V, D], as autograd has it. Those
    of the others are ordered, or converted, in another way."""

    def reason(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.needs_gpu and not ON_GPU:
            return f"needs a GPU: {self.needs_gpu}"
        if self.package and find_spec(self.package) is None:
            why = f": {self.why_absent}" if self.why_absent else ""
            return f"{self.package} is not installed{why}"
        return self.needs()


def each_step(loss: Loss) -> Prepare:
    """Nothing to prepare."""
    return lambda t: loss


def module(
    make: Callable[[], Callable[..., Any]], call: Callable[[Any, Tensors], Tensor]
) -> Prepare:
    """A module of a package that is imported only when it runs."""

    def prepare(t: Tensors) -> Loss:
        made = make()
        return lambda t: call(made, t)

    return prepare


# --- ours ---------------------------------------------------------------------------------------


def our_stored_kl(t: Tensors) -> Loss:
    sketch = spf.sketch_teacher(t.teacher, t.weight)
    return lambda t: spf.linear_kl(t.hidden, t.weight, sketch)


def our_kl(beta: float) -> Prepare:
    return each_step(lambda t: spf.linear_kl(t.hidden, t.weight, t.teacher, beta=beta))


OURS = Peer(
    losses={
        "NLL": each_step(lambda t: spf.linear_nll(t.hidden, t.weight, t.targets)),
        "KL": our_kl(0.0),
        "KL, stored teacher": our_stored_kl,
        "reverse KL": our_kl(1.0),
        "JSD": our_kl(0.5),
        "KL + NLL": each_step(
            lambda t: spf.linear_distill(t.hidden, t.weight, t.targets, t.teacher, alpha=0.5)
        ),
    }
)

# --- PyTorch, the logits in memory ----------------------------------------------------------------


def log_probabilities(hidden: Tensor, weight: Tensor) -> Tensor:
    """fp32 softmax of the logits, whatever their dtype is."""
    return F.linear(hidden, weight).log_softmax(-1, dtype=torch.float32)


def kl_div(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q), mean over the tokens."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def teacher_log_p(t: Tensors) -> Tensor:
    with torch.no_grad():
        return log_probabilities(t.teacher, t.weight)


def nll(t: Tensors) -> Tensor:
    return F.cross_entropy(F.linear(t.hidden, t.weight).float(), t.targets)


def forward_kl(t: Tensors) -> Tensor:
    log_p = teacher_log_p(t)
    return kl_div(log_probabilities(t.hidden, t.weight), log_p)


def reverse_kl(t: Tensors) -> Tensor:
    log_p = teacher_log_p(t)
    return kl_div(log_p, log_probabilities(t.hidden, t.weight))


def jsd(t: Tensors) -> Tensor:
    log_p, log_q = teacher_log_p(t), log_probabilities(t.hidden, t.weight)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * (kl_div(log_m, log_p) + kl_div(log_m, log_q))


def mix(t: Tensors) -> Tensor:
    log_p, log_q = teacher_log_p(t), log_probabilities(t.hidden, t.weight)
    return 0.5 * (kl_div(log_q, log_p) + F.nll_loss(log_q, t.targets))


def stored_kl(t: Tensors, log_p: Tensor) -> Tensor:
    return kl_div(log_probabilities(t.hidden, t.weight), log_p)


def materialised(transform: Callable[[Any], Any]) -> dict[str, Prepare]:
    """The losses above, each through ``transform``: itself, or compiled."""

    def prepared(function: Callable[..., Tensor]) -> Prepare:
        return lambda t: transform(function)

    def prepare_stored(t: Tensors) -> Loss:
        log_p, function = teacher_log_p(t), transform(stored_kl)
        return lambda t: function(t, log_p)

    return {
        "NLL": prepared(nll),
        "KL": prepared(forward_kl),
        "KL, stored teacher": prepare_stored,
        "reverse KL": prepared(reverse_kl),
        "JSD": prepared(jsd),
        "KL + NLL": prepared(mix),
    }


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For one shape at a time. More tuning changes nothing for training on a CPU."""
    mode = "max-autotune-no-cudagraphs" if ON_GPU else None
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


# --- PyTorch's chunked cross entropy ----------------------------------------------------------


def chunked_cross_entropy(t: Tensors) -> Loss:
    """Its own choice of chunk takes 5 times as long on a CPU as this one."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=ROWS, chunking_method=None)
    return lambda t: F.linear_cross_entropy(t.hidden, t.weight, t.targets, options=options)


def has_linear_cross_entropy() -> str | None:
    missing = not hasattr(torch.nn, "LinearCrossEntropyOptions")
    return f"torch {torch.__version__} has no LinearCrossEntropyOptions" if missing else None


# --- Liger Kernel, TRL, cut-cross-entropy, quack, Unsloth-zoo --------------------------------


def liger_chunked(beta: float, hard: float = 0.0) -> Prepare:
    """compiled=True and chunks of 1024 rows, as it comes: smaller ones are not faster."""

    def make() -> Callable[..., Any]:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        return LigerFusedLinearJSDLoss(
            weight_hard_loss=hard, weight_soft_loss=1 - hard, beta=beta, compiled=True
        )

    return module(make, lambda f, t: f(t.hidden, t.weight, t.teacher, t.weight, t.targets))


def liger_jsd(beta: float) -> Prepare:
    def make() -> Callable[..., Any]:
        from liger_kernel.transformers import LigerFusedLinearJSD

        return LigerFusedLinearJSD(jsd_beta=beta)

    return module(make, lambda f, t: f(t.hidden, t.weight, t.teacher, t.weight, None))


def liger_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()


def liger_stored_kl(t: Tensors) -> Loss:
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    p, loss = teacher_log_p(t).exp(), LigerFusedLinearKLDivLoss()
    return lambda t: loss(t.hidden, t.weight, p)


def trl_nll() -> Callable[..., Any]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply


def trl_divergence(beta: float) -> Prepare:
    def make() -> Callable[..., Any]:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return ChunkedDivergenceFunction.apply

    return module(
        make, lambda f, t: f(t.hidden, t.weight, None, t.teacher, t.weight, None, beta)[0].mean()
    )


def cce(**options: Any) -> Prepare:
    def make() -> Callable[..., Any]:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy

    return module(make, lambda f, t: f(t.hidden, t.weight, t.targets, **options))


def quack() -> Callable[..., Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def unsloth_nll() -> Callable[..., Any]:
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_cross_entropy

    return fused_linear_cross_entropy


def unsloth_divergence(beta: float) -> Prepare:
    def make() -> Callable[..., Any]:
        from unsloth_zoo.fused_losses.fused_linear import fused_linear_jsd

        return fused_linear_jsd

    return module(make, lambda f, t: f(t.hidden, t.weight, t.teacher, t.weight, beta=beta))


def has_unsloth() -> str | None:
    missing = find_spec("unsloth") is None
    return "unsloth_zoo refuses to be imported without unsloth" if missing else None


TRITON = "Triton kernels"
PEERS: dict[str, Peer] = {
    "softprompt_fast": OURS,
    "PyTorch": Peer(losses=materialised(lambda function: function), torch_product_back=True),
    "PyTorch, torch.compile": Peer(losses=materialised(compiled), torch_product_back=True),
    "F.linear_cross_entropy": Peer(
        needs=has_linear_cross_entropy, losses={"NLL": chunked_cross_entropy}
    ),
    "cut-cross-entropy, torch_compile": Peer(
        package="cut_cross_entropy",
        losses={"NLL": cce(impl="torch_compile")},
        torch_product_back=True,
    ),
    "cut-cross-entropy, cce": Peer(
        package="cut_cross_entropy", needs_gpu=TRITON, losses={"NLL": cce(impl="cce")}
    ),
    "cut-cross-entropy, cce exact": Peer(
        package="cut_cross_entropy",
        needs_gpu=TRITON,
        losses={"NLL": cce(impl="cce", filter_eps=None)},
    ),
    "Liger chunked JSD": Peer(
        package="liger_kernel",
        losses={
            "KL": liger_chunked(0.0),
            "reverse KL": liger_chunked(1.0),
            "JSD": liger_chunked(0.5),
            "KL + NLL": liger_chunked(0.0, hard=0.5),
        },
        torch_product_back=True,
    ),
    "Liger fused linear": Peer(
        package="liger_kernel",
        needs_gpu=TRITON,
        losses={
            "NLL": module(liger_cross_entropy, lambda f, t: f(t.weight, t.hidden, t.targets)),
            "KL": liger_jsd(0.0),
            "KL, stored teacher": liger_stored_kl,
            "reverse KL": liger_jsd(1.0),
            "JSD": liger_jsd(0.5),
        },
    ),
    "TRL chunked": Peer(
        package="trl",
        losses={
            # tile, softcap, scale, and none of the figures that it can compute beside
            "NLL": module(
                trl_nll,
                lambda f, t: (
                    -f(t.hidden, t.weight, None, t.targets, 1.0, TRL_TILE, None, 1.0, ())[0].mean()
                ),
            ),
            "KL": trl_divergence(0.0),
            "reverse KL": trl_divergence(1.0),
            "JSD": trl_divergence(0.5),
        },
    ),
    "quack": Peer(
        package="quack",
        needs_gpu="CuTe kernels for Hopper and Blackwell",
        losses={"NLL": module(quack, lambda f, t: f(t.hidden, t.weight, t.targets))},
    ),
    "Unsloth-zoo fused linear": Peer(
        package="unsloth_zoo",
        why_absent="it wants unsloth, transformers<=5.17, trl<=1.15 and datasets<5, and the others "
        "here are newer",
        needs=has_unsloth,
        losses={
            "NLL": module(
                unsloth_nll,
                lambda f, t: f(t.hidden, t.weight, None, t.targets, divisor=len(t.targets)),
            ),
            "KL": unsloth_divergence(0.0),
            "reverse KL": unsloth_divergence(1.0),
            "JSD": unsloth_divergence(0.5),
        },
    ),
}
