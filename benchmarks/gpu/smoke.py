"""The first questions of ``make gpu``, each in a process of its own.

smoke.py versions           # what is installed, and which backends can run
smoke.py contract BACKEND   # every loss, once, against the numerics contract
smoke.py batch BACKEND      # are rows bitwise the same in every batch?
"""

from __future__ import annotations

import importlib.util
import platform
import sys

import torch
from gpu.common import ON_GPU, emit, kernels_can_run

import softprompt_fast as spf


def versions() -> None:
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    emit(
        "machine",
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=triton,
        capability=list(torch.cuda.get_device_capability()) if ON_GPU else None,
        softprompt_fast=spf.__version__,
        package=spf.__file__,
        build=spf.backends.build_info(),
        backends=spf.backends.available(),
    )


def contract(backend: str) -> None:
    """The losses in the dtype of the benchmarks first: what compiles first is told first."""
    from contract import check, make_case, run, sketched

    losses = {
        "NLL": ("linear_nll", {}),
        "KL": ("linear_kl", {}),
        "KL, sketch": ("linear_kl", {}),
        "reverse KL": ("linear_kl", {"beta": 1.0}),
        "JSD": ("linear_kl", {"beta": 0.3}),
        "KL + NLL, every option": (
            "linear_distill",
            dict(bias=True, ignored=0.2, softcap=20.0, temperature=1.5, label_smoothing=0.1),
        ),
    }
    for name, (loss, options) in losses.items():
        case = make_case(
            loss, shape=(35,), width=72, vocabulary=4099, dtype=torch.bfloat16, **options
        )
        try:
            problem = sketched(case) if name == "KL, sketch" else case
            check(case, *run(problem, backend=backend))
        except AssertionError as error:
            emit("smoke", backend=backend, loss=name, problem=str(error).splitlines()[0])
        else:
            emit("smoke", backend=backend, loss=name, problem=None)


def batch(backend: str) -> None:
    """cuBLAS picks its algorithm by the shape: measured here, not promised."""
    from contract import make_case, run

    T, D, V = (300, 256, 32003) if ON_GPU else (20, 24, 1003)
    for loss in ("linear_nll", "linear_kl"):
        case = make_case(
            loss, shape=(T,), width=D, vocabulary=V, dtype=torch.bfloat16, reduction="none"
        )
        token_loss, gradient = run(case, backend=backend)
        for rows in (1, 2, 7, T // 4, T // 2):
            few_loss, few_gradient = run(case.rows(slice(0, rows)), backend=backend)
            same = (few_loss == token_loss[:rows]) & (few_gradient == gradient[:rows]).all(-1)
            emit("batches", backend=backend, loss=loss, T=T, rows=rows, same=int(same.sum()))


PROGRAMS = {"versions": versions, "contract": contract, "batch": batch}

if __name__ == "__main__":
    with kernels_can_run():
        PROGRAMS[sys.argv[1]](*sys.argv[2:])
