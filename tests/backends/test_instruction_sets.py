"""Every instruction set that the one binary holds computes the same losses."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

LOSSES = """
import torch, softprompt_fast as spf
torch.manual_seed(0)
assert spf.backends.build_info()["instruction_set"] == INSTRUCTION_SET
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    hidden, teacher = torch.randn(61, 37).to(dtype), torch.randn(61, 37).to(dtype)
    weight, bias = (torch.randn(515, 37) / 6).to(dtype), torch.randn(515).to(dtype)
    targets = torch.randint(0, 515, (61,))
    head = dict(bias=bias, softcap=9.0, logit_scale=1.3, temperature=0.8)
    for beta in (0.0, 0.3, 1.0):
        def run(module, cast, **options):
            h = cast(hidden).requires_grad_()
            cast_head = dict(head, bias=cast(bias))
            loss = module.linear_distill(
                h, cast(weight), targets, cast(teacher), beta=beta, label_smoothing=0.1,
                **cast_head, **options
            )
            loss.backward()
            return loss.double(), h.grad.double()
        exact, exact_grad = run(spf.reference, torch.Tensor.double)
        loss, grad = run(spf, torch.clone, backend="cpp")
        assert abs(loss - exact) < 2e-5, (dtype, beta, loss, exact)
        error = (grad - exact_grad).norm() / exact_grad.norm()
        assert error < 1e-5 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps), error
"""

# a * b - float32(a * b) is lost where the product is rounded before it is added
ROUNDING = """
import torch, softprompt_fast as spf
a, b = torch.tensor([1.0 + 2**-12, 1.0 + 2**-13])
lost = float(a.double() * b.double() - (a * b).double())
hidden = torch.tensor([[1.0, a]])
weight = torch.tensor([[-a * b, b], [0.0, 0.0]])
for rows in (1, 50):  # of one vector and of several
    loss = spf.linear_nll(
        hidden.expand(rows, 2), weight, torch.ones(rows, dtype=torch.long), logit_scale=1 / lost,
        backend="cpp",
    )
    logits = torch.tensor([float(FUSED), 0.0])
    assert abs(loss - logits.logsumexp(0)) < 1e-6, (rows, loss)
"""

INSTRUCTION_SETS = pytest.mark.parametrize(
    ("capability", "name"), [("default", "baseline"), ("avx2", "avx2"), ("avx512", "avx512")]
)


def run_with(capability: str, script: str, folder) -> None:
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in order or order.index(capability.upper()) > order.index(here):
        pytest.skip(f"this CPU offers {here}")
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,  # not the checkout: the installed package is tested
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@INSTRUCTION_SETS
def test_an_instruction_set_computes_the_losses(tmp_path, capability: str, name: str) -> None:
    run_with(capability, LOSSES.replace("INSTRUCTION_SET", repr(name)), tmp_path)


@pytest.mark.slow
@INSTRUCTION_SETS
def test_products_are_fused_with_sums_where_the_cpu_can(tmp_path, capability, name: str) -> None:
    """Without its fused instructions an engine is right but slow: no other test sees it."""
    fused = name != "baseline" or platform.machine() == "aarch64"
    run_with(capability, ROUNDING.replace("FUSED", str(fused)), tmp_path)
