"""The measuring program of ``make gpu``, in a process of its own.

    measure.py ceilings             # what this GPU does at most: a copy, a matrix product
    measure.py losses JSON          # cases of gpu/cases.py, one record each, in order

Nothing is timed before its gradient has been compared with fp64.

Legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import torch
from cases import DEVICE_DTYPE, LOSSES
from device import peak_mib
from gpu.cases import Case
from gpu.common import (
    DEVICE,
    ON_GPU,
    capture,
    emit,
    host_microseconds,
    interleaved,
    kernels_can_run,
    poison_free_memory,
)
from losses.problems import BarePasses, Exact, Tensors, mm, product_dtype
from torch import Tensor

import softprompt_fast as spf

DTYPE = getattr(torch, DEVICE_DTYPE["cuda"])
CHECKED_ROWS = 16
# Longer steps launch nothing that a graph would save.
GRAPH_TOKENS = 1024


def gradient(module: ModuleType, case: Case, t: Tensors, teacher: Any, **options: Any) -> Tensor:
    """One step: the loss and its gradient by the hidden states."""
    name, own, _ = LOSSES[case.loss]
    others = {
        "linear_nll": (t.targets,),
        "linear_kl": (teacher,),
        "linear_distill": (t.targets, teacher),
    }
    loss = getattr(module, name)(t.hidden, t.weight, *others[name], **own, **options)
    return torch.autograd.grad(loss, t.hidden)[0]


def checked_error(case: Case, t: Tensors, found: Tensor) -> float:
    """Relative L2 error of sampled rows against fp64, which must hold the numerics contract."""
    index = torch.randint(case.T, (min(CHECKED_ROWS, case.T),), device=DEVICE)
    index[0], index[-1] = 0, case.T - 1
    sample = t.rows(index)
    exact = gradient(spf.reference, case, sample, sample.teacher)
    bounds = sample.bounds(DTYPE)
    return Exact(index, exact, bounds).check(found, bounds.contract)


def measure_loss(case: Case) -> None:
    t = Tensors.random(case, DTYPE)
    teacher = spf.sketch_teacher(t.teacher, t.weight) if case.sketched else t.teacher
    bare = BarePasses(t)

    def step() -> Tensor:
        own = {"backend": case.backend, "workspace_mib": case.workspace_mib}
        return gradient(spf, case, t, teacher, **own)

    def products() -> None:
        for _ in range(case.streams):
            bare.multiply()
        bare.multiply_back()

    poison_free_memory()
    error = checked_error(case, t, step())
    # beyond the gradient, as in make bench
    memory = peak_mib(step) - t.hidden.nbytes / 2**20 if ON_GPU else None
    works = {"bare": products, "step": step}
    replay = capture(step) if case.T <= GRAPH_TOKENS else None
    if replay is not None:
        works["graph"] = replay
    times = interleaved(works)
    floor, ours = times["bare"], times["step"]
    figures: dict[str, Any] = {
        "milliseconds": ours.milliseconds,
        "spread": ours.spread,
        "bare_milliseconds": floor.milliseconds,
        "bare_spread": floor.spread,
        "floor": case.passes,
        "passes": case.passes * ours.milliseconds / floor.milliseconds,
        "ratio": ours.milliseconds / floor.milliseconds,
        "peak_mib": memory,
        "fp32_gradient_mib": 4 * case.T * case.D / 2**20,
        "gradient_error": error,
        "graph_milliseconds": times["graph"].milliseconds if replay is not None else None,
        "host_microseconds": host_microseconds(step),
    }
    met = all(figures[name] <= limit for name, limit in case.target.items())
    emit(
        "rows",
        backend=case.backend,
        loss=case.loss,
        T=case.T,
        D=case.D,
        V=case.V,
        dtype=str(DTYPE)[6:],
        workspace_mib=case.workspace_mib,
        **figures,
        target=case.target or None,
        met=met if case.target else None,
    )


def measure_losses(cases: str) -> None:
    for fields in json.loads(cases):
        measure_loss(Case(**fields))


def measure_ceilings() -> None:
    """Bytes of a copy are those read and those written."""
    size = 2**32 if ON_GPU else 2**20
    source = torch.empty(size // 4, device=DEVICE).normal_()
    target = torch.empty_like(source)
    n = 8192 if ON_GPU else 64
    a, b = (torch.empty(n, n, dtype=DTYPE, device=DEVICE).normal_() for _ in range(2))
    out = torch.empty(n, n, dtype=product_dtype(DTYPE), device=DEVICE)
    times = interleaved({"copy": lambda: target.copy_(source), "mm": lambda: mm(a, b, out)})
    emit(
        "ceilings",
        copy_gb_per_second=2 * size / times["copy"].milliseconds / 1e6,
        copy_spread=times["copy"].spread,
        mm_tflops=2 * n**3 / times["mm"].milliseconds / 1e9,
        mm_spread=times["mm"].spread,
        mm_shape=[n, n, n],
    )


PROGRAMS = {"ceilings": measure_ceilings, "losses": measure_losses}

if __name__ == "__main__":
    with kernels_can_run():
        PROGRAMS[sys.argv[1]](*sys.argv[2:])
