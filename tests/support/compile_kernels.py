"""Compiles, for a GPU that need not be here, every Triton kernel as the engines launch it.

The engines run on tensors without storage; what they would launch is recorded, compiled for the
chip that is named, and its resources are printed as one JSON object a line. A program of its own,
since Triton decides at import whether it compiles or interprets.

    python compile_kernels.py cuda:90
"""

from __future__ import annotations

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
from triton.compiler import ASTSource

from softprompt_fast.backends import gpu_rows
from softprompt_fast.backends import gpu_streaming as streaming_engine
from softprompt_fast.backends.formulas import LogitTransform
from softprompt_fast.backends.problem import Head, HiddenTeacher, Problem, SparseTarget
from softprompt_fast.kernels import formulas, rows, streaming

VOCABULARIES = (32000, 49152, 128256, 151936, 262144)
WIDTH, TOKENS = 4096, 1024
MORE = 127  # targets, as many as a sketch has by default
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
ALIGNED = [["tt.divisibility", 16]]


class Launch(NamedTuple):
    """One way in which a kernel is launched; equal ones are compiled once."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


def launch_of(kernel: Any, arguments: tuple, options: dict[str, Any]) -> Launch:
    """What Triton makes of these arguments: their types, and the values it compiles in."""
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    named |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, constants, aligned = {}, {}, []
    for position, name in enumerate(kernel.arg_names):
        value = named[name]
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned.append(position)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif kernel.params[position].is_constexpr or value is None or value == 1:
            signature[name] = "constexpr"
            constants[name] = value if not hasattr(value, "__name__") else value.__name__
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            aligned += [position] if value % 16 == 0 else []
    parts = (signature.items(), constants.items(), aligned, options.items())
    return Launch(kernel.__name__, *map(tuple, parts))


def recorded_launches(plain: bool) -> set[Launch]:
    """Every launch of the triton and the streaming backend, over vocabularies of real models.

    plain: those too that need no more registers than the others: without options, without the
    gradient, by KL in place of Jensen-Shannon, and in fp16 in place of bf16.
    """
    launches = set()
    kernels = [
        value
        for module in (rows, streaming)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    ]
    for kernel in kernels:
        kernel.run = lambda *arguments, kernel=kernel, grid, warmup, **options: launches.add(
            launch_of(kernel, arguments, options)
        )
    for vocabulary in VOCABULARIES:
        for problem in problems(vocabulary, plain):
            gpu_rows.triton_token_loss(problem)
            streaming_engine.token_loss(problem)
    assert {launch.kernel for launch in launches} == {kernel.__name__ for kernel in kernels}
    return launches


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
            target = SparseTarget(ids, smoothing=0.1 if every_option else 0.0)
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


def compiled(task: tuple[Launch, str]) -> dict[str, Any]:
    """The resources that a launch takes on a chip."""
    launch, chip = task
    kernel = getattr(rows, launch.kernel, None) or getattr(streaming, launch.kernel)
    constants = dict(launch.constants)
    if "divergence" in constants:
        constants["divergence"] = getattr(formulas, constants["divergence"])
    source = ASTSource(
        kernel, dict(launch.signature), constants, {(at,): ALIGNED for at in launch.aligned}
    )
    backend, _, arch = chip.partition(":")
    target = GPUTarget(
        backend, arch if backend == "hip" else int(arch), 64 if backend == "hip" else 32
    )
    binary = triton.compile(source, target=target, options=dict(launch.options))
    report = resources_of_cubin if backend == "cuda" else resources_of_gcn
    return {
        "kernel": launch.kernel,
        "constants": {name: str(value) for name, value in launch.constants if value is not None},
        "dtype": sorted({kind for _, kind in launch.signature if kind.startswith("*")}),
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


if __name__ == "__main__":
    launches = recorded_launches(plain=sys.argv[1] == "cuda:90")
    tasks = [(launch, sys.argv[1]) for launch in sorted(launches, key=str)]
    with multiprocessing.Pool(2) as pool:
        for row in pool.imap_unordered(compiled, tasks):
            print(json.dumps(row), flush=True)
