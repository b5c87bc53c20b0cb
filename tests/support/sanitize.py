"""Every GPU kernel at small and ragged sizes: what compute-sanitizer runs in ``make gpu``.

    compute-sanitizer --tool memcheck python3 tests/support/sanitize.py triton | cuda | streaming

Legend: C rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

import os
import sys

# Every tensor is an allocation of its own: an access past its end is found.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.backends.formulas import LogitTransform
from softprompt_fast.backends.problem import SparseTarget

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
C = 3
# Below one block of a row, several blocks, a cluster of blocks, and more than a cluster holds.
CUDA_VOCABULARIES = (1, 7, 1003, 50257, 151943, 600011)
# All alike modulo 16, so that each kernel is compiled once.
TRITON_VOCABULARIES = (5, 4099, 12293)
BETAS = (0.0, 0.3, 1.0)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def logits_of(vocabulary: int) -> Tensor:
    """As the engine hands them over: rows begin at multiples of 8 entries.    [C, stride]"""
    return normal(C, -(-vocabulary // 8) * 8)


def row_kernels(kernels, vocabulary: int, dtype: torch.dtype, nll_only: bool) -> None:
    """With and without a gradient, over the logits and apart from them, with every option."""
    loss = torch.full((C,), torch.nan, device=DEVICE)
    targets = torch.randint(vocabulary, (C,), device=DEVICE)
    keep = torch.tensor([True, False, True], device=DEVICE)
    bias = normal(vocabulary, dtype=dtype)
    unscale = torch.empty(C, device=DEVICE) if dtype == torch.float16 else None

    more = (targets.unsqueeze(-1) + 1 + torch.arange(40, device=DEVICE)) % vocabulary
    masses = torch.full((C, 41), 0.02, device=DEVICE)
    masses[:, 1 + min(40, vocabulary - 1) :] = 0.0  # no entry comes twice

    label = SparseTarget(targets, smoothing=0.1)

    def in_place(logits: Tensor) -> Tensor:
        return logits.view(dtype)[:, :vocabulary]

    def apart(_: Tensor) -> Tensor:
        return torch.empty(C, vocabulary, dtype=dtype, device=DEVICE)

    for where in (in_place, apart):
        full = logits_of(vocabulary)
        options = dict(keep=keep, bias=bias, transform=LogitTransform(5.0), unscale=unscale)
        for target in (label, SparseTarget(targets, more, masses, 0.1)):
            full = logits_of(vocabulary)
            kernels.sparse_target_rows_(full[:, :vocabulary], target, loss, where(full), **options)
            assert loss.isfinite().all()
    plain = SparseTarget(targets)
    kernels.sparse_target_rows_(logits_of(vocabulary)[:, :vocabulary], plain, loss, None)
    for beta in () if nll_only else BETAS:
        full, teacher = logits_of(vocabulary), logits_of(vocabulary)[:, :vocabulary]
        divergence = dict(options, target=label, teacher_bias=bias, beta=beta, alpha=0.4)
        kernels.divergence_rows_(full[:, :vocabulary], teacher, loss, in_place(full), **divergence)
        assert loss.isfinite().all()
        logits = logits_of(vocabulary)[:, :vocabulary]
        kernels.divergence_rows_(logits, teacher, loss, None, beta=beta)


def triton() -> None:
    from softprompt_fast.kernels import rows

    for vocabulary in TRITON_VOCABULARIES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            row_kernels(rows, vocabulary, dtype, nll_only=dtype != torch.bfloat16)


def cuda() -> None:
    from softprompt_fast.backends import cuda_rows

    for vocabulary in CUDA_VOCABULARIES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            row_kernels(cuda_rows, vocabulary, dtype, nll_only=False)


def streaming() -> None:
    """In chunks of rows, and in strips of the vocabulary."""
    T, D = (140, 72) if ON_GPU else (9, 24)
    for vocabulary, workspace_mib in ((1003, 256), (5003, 0.5)):
        for dtype, loss in ((torch.bfloat16, "linear_nll"), (torch.float16, "linear_distill")):
            hidden = normal(T, D, dtype=dtype).requires_grad_()
            weight, bias = normal(vocabulary, D, dtype=dtype), normal(vocabulary, dtype=dtype)
            targets = torch.randint(vocabulary, (T,), device=DEVICE)
            targets[::3] = -100
            teacher = () if loss == "linear_nll" else (normal(T, D, dtype=dtype),)
            for beta in BETAS if teacher else (None,):
                options = {} if beta is None else {"beta": beta}
                value = getattr(spf, loss)(
                    hidden,
                    weight,
                    targets,
                    *teacher,
                    bias=bias,
                    label_smoothing=0.1,
                    backend="streaming",
                    workspace_mib=workspace_mib,
                    **options,
                )
                (gradient,) = torch.autograd.grad(value, hidden)
                assert gradient.isfinite().all()
            sketch = spf.sketch_teacher(normal(T, D, dtype=dtype), weight, bias=bias)
            options = {"backend": "streaming", "workspace_mib": workspace_mib}
            value = spf.linear_distill(hidden, weight, targets, sketch, bias=bias, **options)
            assert torch.autograd.grad(value, hidden)[0].isfinite().all()


if __name__ == "__main__":
    torch.manual_seed(0)
    {"triton": triton, "cuda": cuda, "streaming": streaming}[sys.argv[1]]()
    print(f"all {sys.argv[1]} kernels ran")
