"""Compiles, for a GPU that need not be here, every Triton kernel as the engines launch it.

The engines run on tensors without storage; what they would launch is recorded, compiled for the
chip that is named, and its resources are printed as one JSON object a line. A program of its own,
since Triton decides at import whether it compiles or interprets.

    python compile_kernels.py cuda:90
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from softprompt_fast.backends import gpu_rows
from softprompt_fast.backends import gpu_streaming as streaming_engine
from softprompt_fast.backends.formulas import LogitTransform
from softprompt_fast.backends.problem import Head, HiddenTeacher, Problem, SparseTarget
from softprompt_fast.kernels import rows, streaming

VOCABULARIES = (32000, 49152, 128256, 151936, 262144)
WIDTH, TOKENS = 4096, 64  # one chunk
MORE = 127  # targets, as many as a sketch has by default


class Launch(NamedTuple):
    """One way in which a kernel is launched, as Triton compiles it."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def __str__(self) -> str:
        """Equal launches are compiled once."""
        return f"{self.kernel.__name__} {self[1:]}"


def launch_of(kernel: Any, chip: GPUTarget, arguments: tuple, options: dict[str, Any]) -> Launch:
    """What Triton makes of these arguments: their types, and the values it compiles in."""
    backend = make_backend(chip)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*arguments, **options)
    options, *parts = kernel._pack_args(backend, options, bound, specialization, options)
    return Launch(kernel, *parts, vars(options))


def recorded_launches(chip: GPUTarget, plain: bool) -> list[Launch]:
    """Every launch of the triton and the streaming backend, over vocabularies of real models.

    plain: those too that need no more registers than the others: without options, without the
    gradient, by KL in place of Jensen-Shannon, and in fp16 in place of bf16.
    """
    launches = {}
    kernels = [
        value
        for module in (rows, streaming)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    ]

    def record(*arguments, kernel, grid, warmup, **options):
        launch = launch_of(kernel, chip, arguments, options)
        launches[str(launch)] = launch

    for kernel in kernels:
        kernel.run = functools.partial(record, kernel=kernel)
    for vocabulary in VOCABULARIES:
        for problem in problems(vocabulary, plain):
            gpu_rows.triton_token_loss(problem)
            streaming_engine.token_loss(problem)
    assert {launch.kernel for launch in launches.values()} == set(kernels)
    return [launches[name] for name in sorted(launches)]


def problems(vocabulary: int, plain: bool) -> Iterator[Problem]:
    """Every divergence and option over tensors without storage. plain: see recorded_launches."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def head(dtype, every_option) -> Head:
        return Head(
            empty(vocabulary, WIDTH, dtype=dtype),
            empty(vocabulary, dtype=dtype) if every_option else None,
            LogitTransform(softcap=30.0 if every_option else None),
        )

    def sketch(*options):
        more = empty(TOKENS, MORE, dtype=torch.int64)
        masses = empty(TOKENS, 1 + MORE, dtype=torch.float32)
        made = problem(*options)
        return made._replace(target=made.target._replace(more=more, masses=masses))

    def problem(dtype, targets, alpha, beta, every_option, with_grad=True):
        target = teacher = None
        if targets:
            ids = empty(TOKENS, dtype=torch.int64)
            target = SparseTarget(ids, smoothing=0.1 if every_option else None)
        if alpha > 0:
            own = head(dtype, every_option) if every_option else None
            teacher = HiddenTeacher(empty(TOKENS, WIDTH, dtype=dtype), own, beta)
        return Problem(
            hidden=empty(TOKENS, WIDTH, dtype=dtype),
            head=head(dtype, every_option),
            target=target,
            teacher=teacher,
            alpha=alpha,
            keep=empty(TOKENS, dtype=torch.bool) if every_option else None,
            with_grad=with_grad,
        )

    for beta in (0.0, 0.5, 1.0) if plain else (0.5,):
        yield problem(torch.bfloat16, True, 0.5, beta, True)
    yield problem(torch.float32, True, 0.5, 0.5, True)
    yield problem(torch.float32, True, 0.0, 0.0, True)
    kinds = [(torch.bfloat16, True)]
    if plain:
        kinds += [(torch.float16, True), (torch.bfloat16, False)]
    for dtype, every_option in kinds:
        yield problem(dtype, True, 0.0, 0.0, every_option)
        yield sketch(dtype, True, 0.0, 0.0, every_option)
        yield problem(dtype, False, 1.0, 0.0, every_option)
    if plain:
        yield problem(torch.bfloat16, True, 0.5, 0.5, True, with_grad=False)
    yield sketch(torch.float32, True, 0.0, 0.0, True)
    if plain:
        yield sketch(torch.bfloat16, True, 0.0, 0.0, True, False)


def compiled(launch: Launch, chip: GPUTarget) -> dict[str, Any]:
    """The resources that a launch takes on a chip."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    binary = triton.compile(source, target=chip, options=launch.options)
    report = resources_of_cubin if chip.backend == "cuda" else resources_of_gcn
    return {
        "kernel": launch.kernel.__name__,
        "signature": str(launch.signature),
        "constants": str([value for value in launch.constants.values() if value is not None]),
        "shared": binary.metadata.shared,
        **report(binary.asm),
    }


def resources_of_cubin(asm: dict[str, Any]) -> dict[str, int]:
    """Registers of a thread and bytes of its stack: what did not fit the registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "spilled": usage["STACK"] + usage["LOCAL"]}


def resources_of_gcn(asm: dict[str, Any]) -> dict[str, int]:
    def number(name: str) -> int:
        return int(re.search(rf"{name}: *(\d+)", asm["amdgcn"])[1])

    return {"registers": number(".vgpr_count"), "spilled": number("ScratchSize")}


def chip_of(name: str) -> GPUTarget:
    backend, _, arch = name.partition(":")
    return GPUTarget(backend, arch, 64) if backend == "hip" else GPUTarget(backend, int(arch), 32)


if __name__ == "__main__":
    chip = chip_of(sys.argv[1])
    launches = recorded_launches(chip, plain=sys.argv[1] == "cuda:90")

    def row(at: int) -> dict[str, Any]:
        return compiled(launches[at], chip)

    # forked, since kernels cannot be sent
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for line in pool.imap_unordered(row, range(len(launches))):
            print(json.dumps(line), flush=True)
