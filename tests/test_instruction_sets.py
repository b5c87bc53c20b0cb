"""Every instruction set that the one binary holds computes the same losses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

SCRIPT = """
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


@pytest.mark.parametrize(
    ("capability", "name"), [("default", "baseline"), ("avx2", "avx2"), ("avx512", "avx512")]
)
def test_an_instruction_set_computes_the_losses(tmp_path, capability: str, name: str) -> None:
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = torch.backends.cpu.get_cpu_capability()
    if here not in order or order.index(capability.upper()) > order.index(here):
        pytest.skip(f"this CPU offers {here}")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    script = SCRIPT.replace("INSTRUCTION_SET", repr(name))
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,  # not the checkout: the installed package is tested
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
