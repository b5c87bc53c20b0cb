"""Beyond its inputs and outputs a loss allocates no more than ``workspace_mib``.

Measured as resident memory of a fresh process, for that is what a user runs out of: this file is
also the program of that process. Its high-water mark can only rise, so what may take least comes
first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import softprompt_fast as spf

MIB = 2**20
WIDTH, VOCABULARY = 576, 49152
# Several chunks of rows, whatever the workspace.
TOKENS_PER_MIB = {
    ("torch", "linear_nll"): 4,
    ("torch", "linear_distill"): 0.5,
    ("cpp", "linear_nll"): 4,
    ("cpp", "linear_distill"): 4,
}
# What PyTorch keeps for itself: code pages, thread stacks, 5 MiB a thread of MKL's packing buffers.
RUNTIME_MIB = 6 + 5 * torch.get_num_threads()


LOSSES = ("linear_nll", "linear_distill")  # one stream of logits, and two


def allowed_mib(backend: str, loss: str, workspace_mib: float) -> float:
    """The C++ engine keeps no logits of one stream, and few of two, however many tokens come."""
    if backend == "cpp":
        return min(workspace_mib, 10 if loss == "linear_nll" else 32)
    return workspace_mib


def run(backend: str, loss: str, dtype: torch.dtype, sizes: tuple[int, int, int], mib: float):
    """Forward and backward on random numbers: -> MiB that resident memory rose by, at most."""
    tokens, width, vocabulary = sizes
    weight = torch.empty(vocabulary, width, dtype=dtype).normal_(std=width**-0.5)
    hidden = torch.empty(tokens, width, dtype=dtype).normal_().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,))
    teacher = torch.empty(tokens, width, dtype=dtype).normal_()
    arguments = (targets,) if loss == "linear_nll" else (targets, teacher)
    before = memory_mib("VmRSS")
    function = getattr(spf, loss)
    function(hidden, weight, *arguments, backend=backend, workspace_mib=mib).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    return memory_mib("VmHWM") - before


def memory_mib(field: str) -> float:
    """VmRSS: resident now. VmHWM: the most so far; getrusage's starts from the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def outputs_mib(tokens: int, dtype: torch.dtype) -> float:
    """The gradient by hidden: in float32 first, as the op's output, and as hidden.grad."""
    return tokens * WIDTH * (4 + 4 + dtype.itemsize) / MIB


def main(backend: str, dtype_name: str) -> None:
    """Print [loss, workspace_mib, MiB of outputs, MiB measured] for every loss."""
    dtype = getattr(torch, dtype_name)
    for loss in LOSSES:
        run(backend, loss, dtype, (16, 32, 64), 256)
    rows = []
    cases = [(loss, mib) for mib in (32, 128) for loss in LOSSES]
    for loss, mib in sorted(cases, key=lambda case: allowed_mib(backend, *case)):
        tokens = int(TOKENS_PER_MIB[backend, loss] * mib)
        measured = run(backend, loss, dtype, (tokens, WIDTH, VOCABULARY), mib)
        rows.append([loss, mib, outputs_mib(tokens, dtype), measured])
    print(json.dumps(rows))


@pytest.mark.parametrize("backend", ["cpp", pytest.param("torch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_peak_memory_stays_within_the_workspace(backend, dtype):
    """The head's own gradient alone would take 108 MiB."""
    done = subprocess.run(
        [sys.executable, __file__, backend, dtype], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for loss, workspace_mib, outputs, measured in json.loads(done.stdout):
        assert measured <= allowed_mib(backend, loss, workspace_mib) + outputs + RUNTIME_MIB, (
            f"{loss} with workspace_mib={workspace_mib} took {measured:.1f} MiB, "
            f"{outputs:.1f} MiB of them for its outputs"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
