"""The row kernels alone, against a copy on the device that moves as many bytes.

    row_kernels.py BACKEND

Nothing is timed before its gradient has been compared with fp64.

Legend: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch
from cases import GPU_ROW_VOCABULARIES, GPU_ROWS, LOSSES
from gpu.common import DEVICE, ON_GPU, emit, interleaved, kernels_can_run
from torch import Tensor
from torch.nn import functional as F

from softprompt_fast.backends.problem import SparseTarget

DTYPE, U_DTYPE = torch.bfloat16, 2.0**-8
CHECKED_ROWS = 4


def exact_row_gradient(loss: str, z: Tensor, z_p: Tensor, targets: Tensor) -> Tensor:
    """dz in fp64, by autograd through the definition."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum()

    z = z.double().requires_grad_()
    log_q, log_p = z.log_softmax(-1), z_p.double().log_softmax(-1)
    beta = LOSSES[loss].options.get("beta", 0.0)
    if loss == "NLL":
        value = F.nll_loss(log_q, targets, reduction="sum")
    elif beta == 0.0:
        value = kl(log_p, log_q)
    elif beta == 1.0:
        value = kl(log_q, log_p)
    else:
        log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        value = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return torch.autograd.grad(value, z)[0]


def measure(kernels: ModuleType, backend: str, loss: str) -> None:
    """Bytes: what has to move, logits read once and their gradient written once."""
    C, V = (GPU_ROWS, GPU_ROW_VOCABULARIES[loss]) if ON_GPU else (4, 1000)
    z, z_p = (torch.empty(C, V, device=DEVICE).normal_(std=2) for _ in range(2))
    targets = torch.randint(V, (C,), device=DEVICE)
    values = torch.full((C,), torch.nan, device=DEVICE)
    dz = torch.full((C, V), torch.nan, dtype=DTYPE, device=DEVICE)

    def kernel() -> None:
        if loss == "NLL":
            kernels.sparse_target_rows_(z, SparseTarget(targets), values, dz)
        else:
            kernels.divergence_rows_(z, z_p, values, dz, **LOSSES[loss].options)

    kernel()
    first = slice(CHECKED_ROWS)
    exact = exact_row_gradient(loss, z[first], z_p[first], targets[first])
    error = float((dz[first].double() - exact).norm() / exact.norm())
    if not (error <= 2 * U_DTYPE and dz.isfinite().all() and values.isfinite().all()):
        raise SystemExit(f"wrong row gradient: {backend}, {loss}, relative error {error:.3g}")

    moved = C * V * (4 * (1 if loss == "NLL" else 2) + DTYPE.itemsize)
    source = torch.empty(moved // 2, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    works = {"copy": lambda: target.copy_(source), "kernel": kernel}
    times = interleaved(works, seconds=1.0)
    copy, ours = times["copy"], times["kernel"]
    emit(
        "row_kernels",
        backend=backend,
        loss=loss,
        C=C,
        V=V,
        milliseconds=ours.milliseconds,
        spread=ours.spread,
        copy_milliseconds=copy.milliseconds,
        ratio=ours.milliseconds / copy.milliseconds,
        bytes=moved,
        gb_per_second=moved / ours.milliseconds / 1e6,
        gradient_error=error,
    )


def main(backend: str) -> None:
    module = {
        "triton": "softprompt_fast.kernels.rows",
        "cuda": "softprompt_fast.backends.cuda_rows",
    }[backend]
    kernels = importlib.import_module(module)
    for loss in GPU_ROW_VOCABULARIES:
        measure(kernels, backend, loss)


if __name__ == "__main__":
    with kernels_can_run():
        main(sys.argv[1])
