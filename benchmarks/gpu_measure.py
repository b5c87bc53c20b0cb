"""The measuring program of ``make gpu``, in a process of its own.

    gpu_measure.py ceilings             # what this GPU does at most: a copy, a matrix product
    gpu_measure.py losses JSON          # the cases of gpu_cases.py, one record each, in order

Nothing is timed before its gradient has been compared with fp64.

Legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
from gpu_cases import LOSSES, Case
from gpu_common import (
    DEVICE,
    ON_GPU,
    capture,
    emit,
    host_microseconds,
    interleaved,
    kernels_can_run,
    peak_mib,
    poison_free_memory,
)
from torch import Tensor

import softprompt_fast as spf

DTYPE, U_DTYPE = torch.bfloat16, 2.0**-8
U32 = 2.0**-24
CHECKED_ROWS = 16
# fp32 logits of the bare products: few pieces, in the memory of any GPU that runs these shapes.
BARE_BYTES = 8 * 2**30
# Longer steps launch nothing that a graph would save.
GRAPH_TOKENS = 1024


class Tensors(NamedTuple):
    """As a model has them: logits of standard deviation 2, a teacher near the student."""

    hidden: Tensor  # [T, D], requires grad
    weight: Tensor  # [V, D]
    targets: Tensor  # [T]
    teacher: Tensor  # [T, D]
    sketch: spf.TeacherSketch | None = None

    @classmethod
    def random(cls, case: Case) -> Tensors:
        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_(std=std)

        torch.manual_seed(0)
        hidden = normal(case.T, case.D)
        tensors = cls(
            hidden.clone().requires_grad_(),
            normal(case.V, case.D, std=2 * case.D**-0.5),
            torch.randint(case.V, (case.T,), device=DEVICE),
            hidden + normal(case.T, case.D, std=0.3),
        )
        if not case.sketched:
            return tensors
        return tensors._replace(sketch=spf.sketch_teacher(tensors.teacher, tensors.weight))

    def rows(self, index: Tensor) -> Tensors:
        """Some of the tokens, in float64; the teacher as it is."""
        return Tensors(
            self.hidden.detach()[index].double().requires_grad_(),
            self.weight.double(),
            self.targets[index],
            self.teacher[index].double(),
        )


def gradient(module: ModuleType, case: Case, t: Tensors, **options: Any) -> Tensor:
    """One step: the loss and its gradient by the hidden states."""
    name, own = LOSSES[case.loss]
    teacher = t.teacher if t.sketch is None else t.sketch
    others = {
        "linear_nll": (t.targets,),
        "linear_kl": (teacher,),
        "linear_distill": (t.targets, teacher),
    }
    loss = getattr(module, name)(t.hidden, t.weight, *others[name], **own, **options)
    return torch.autograd.grad(loss, t.hidden)[0]


def checked_error(case: Case, t: Tensors, result: Tensor) -> float:
    """Relative L2 error of sampled rows against fp64, which must hold the numerics contract."""
    index = torch.randint(case.T, (min(CHECKED_ROWS, case.T),), device=DEVICE)
    index[0], index[-1] = 0, case.T - 1
    sample = t.rows(index)
    exact = gradient(spf.reference, case, sample, reduction="sum")
    # the step's loss is a mean over T tokens: a power of two
    error = float((case.T * result[index].double() - exact).norm() / exact.norm())
    with torch.no_grad():
        z = spf.reference.logits(torch.cat((sample.hidden, sample.teacher)), sample.weight)
    scale = 1 + float(z.abs().max() + z.logsumexp(-1).abs().max())
    bound = U_DTYPE + 8 * U32 * scale
    if not error <= bound:
        raise SystemExit(f"wrong gradient: relative error {error:.3g}, bound {bound:.3g}: {case}")
    return error


class BarePasses:
    """The products that the loss cannot avoid, in as few pieces as memory allows."""

    def __init__(self, case: Case, t: Tensors) -> None:
        self.hidden, self.weight, self.streams = t.hidden.detach(), t.weight, case.streams
        # in multiples of the products' tiles
        self.rows = min(case.T, BARE_BYTES // (4 * case.V) // 128 * 128)
        self.logits = torch.empty(self.rows, case.V, device=DEVICE)
        self.dz = torch.empty(self.rows, case.V, dtype=DTYPE, device=DEVICE).normal_()
        self.out = torch.empty(self.rows, case.D, device=DEVICE)

    def __call__(self) -> None:
        for hidden in self.hidden.split(self.rows):
            rows = len(hidden)
            for _ in range(self.streams):
                mm(hidden, self.weight.T, self.logits[:rows])
            mm(self.dz[:rows], self.weight, self.out[:rows])


def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
    """fp32 results of bf16 inputs; PyTorch has no such product on the CPU."""
    if a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def measure_loss(case: Case) -> None:
    t = Tensors.random(case)

    def step() -> Tensor:
        return gradient(spf, case, t, backend=case.backend, workspace_mib=case.workspace_mib)

    poison_free_memory()
    error = checked_error(case, t, step())
    memory = peak_mib(step)
    works = {"bare": BarePasses(case, t), "step": step}
    replay = capture(step) if case.T <= GRAPH_TOKENS else None
    if replay is not None:
        works["graph"] = replay
    times = interleaved(works)
    bare, ours = times["bare"], times["step"]
    figures: dict[str, Any] = {
        "milliseconds": ours.milliseconds,
        "spread": ours.spread,
        "bare_milliseconds": bare.milliseconds,
        "bare_spread": bare.spread,
        "floor": case.passes,
        "passes": case.passes * ours.milliseconds / bare.milliseconds,
        "ratio": ours.milliseconds / bare.milliseconds,
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
    out = torch.empty(n, n, device=DEVICE)
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
