"""csrc/cuda/rows.cu compiled by g++ for the CPU, with the signatures of backends/cuda_rows.py."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from softprompt_fast.backends.formulas import IDENTITY, LogitTransform
from softprompt_fast.backends.problem import NO_TARGET, SparseTarget

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "csrc" / "cuda"
H200 = {"major": 9, "block_bytes": 232448, "multiprocessor_bytes": 233472}
RESERVED_BYTES = 1024
OCTET_BYTES = 32
FLAGS = [
    "-std=c++20",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-extern-tls-init",  # shared memory is declared without its size
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-class-memaccess",
]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Logits(ctypes.Structure):
    """rows.h"""

    _fields_ = [
        ("raw", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    ]


class Rows(ctypes.Structure):
    """rows.h"""

    _fields_ = [
        ("C", ctypes.c_int64),
        ("V", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("student", Logits),
        ("teacher", Logits),
        *((name, ctypes.c_void_p) for name in ("targets", "more_targets", "masses")),
        ("K", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("keep", "loss", "dz")),
        ("dz_stride", ctypes.c_int64),
        ("unscale", ctypes.c_void_p),
        *(
            (name, ctypes.c_double)
            for name in (
                "label_smoothing",
                "alpha",
                "beta",
                "softcap",
                "logit_scale",
                "temperature",
            )
        ),
    ]


class Plan(NamedTuple):
    """plan.h"""

    blocks: int
    threads: int
    slice: int
    held_student: int
    held_teacher: int
    shared_bytes: int


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass
class Emulator:
    """The kernels on a device whose facts a test may choose."""

    library: ctypes.CDLL

    @contextlib.contextmanager
    def device(self, *, descending: bool = False, **facts: int) -> Iterator[None]:
        """descending: the last thread of a block goes first"""

        def choose(descending: bool, facts: dict[str, int]) -> None:
            facts = {**H200, **facts}
            self.library.set_device(
                facts["major"],
                facts["block_bytes"],
                facts["multiprocessor_bytes"],
                descending,
            )

        choose(descending, facts)
        try:
            yield
        finally:
            choose(False, {})

    def facts(self, *, paired: int, alone: int, major: int = 9) -> dict[str, int]:
        """A device whose blocks hold so many octets, as one of two on a multiprocessor or alone."""
        own = self.library.exchange_bytes()
        return {
            "major": major,
            "block_bytes": own + OCTET_BYTES * alone,
            "multiprocessor_bytes": 2 * (own + OCTET_BYTES * paired + RESERVED_BYTES),
        }

    def plan(self, vocabulary: int, streams: int) -> Plan:
        numbers = (ctypes.c_int * 6)()
        self.library.plan(ctypes.c_int64(vocabulary), streams, numbers)
        return Plan(*numbers)

    def sparse_target_rows_(
        self, logits: Tensor, target: SparseTarget, loss: Tensor, dz: Tensor | None, **options: Any
    ) -> None:
        rows = self._rows(logits, target, loss, dz, **options)
        self._launched(self.library.sparse_target_rows(ctypes.byref(rows)))

    def divergence_rows_(
        self,
        logits: Tensor,
        teacher_logits: Tensor,
        loss: Tensor,
        dz: Tensor | None,
        *,
        target: SparseTarget = NO_TARGET,
        teacher_bias: Tensor | None = None,
        **options: Any,
    ) -> None:
        rows = self._rows(logits, target, loss, dz, **options)
        rows.teacher = Logits(
            teacher_logits.data_ptr(), teacher_logits.stride(0), pointer(teacher_bias)
        )
        self._launched(self.library.divergence_rows(ctypes.byref(rows)))

    def _rows(
        self,
        logits: Tensor,
        target: SparseTarget,
        loss: Tensor,
        dz: Tensor | None,
        *,
        beta: float = 0.0,
        alpha: float = 1.0,
        bias: Tensor | None = None,
        transform: LogitTransform = IDENTITY,
        keep: Tensor | None = None,
        unscale: Tensor | None = None,
    ) -> Rows:
        count, vocabulary = logits.shape
        head = dz if dz is not None else bias
        return Rows(
            C=count,
            V=vocabulary,
            dtype=0 if head is None else DTYPES[head.dtype],
            student=Logits(logits.data_ptr(), logits.stride(0), pointer(bias)),
            targets=pointer(target.ids),
            more_targets=pointer(target.more),
            masses=pointer(target.masses),
            K=0 if target.more is None else target.more.shape[1],
            keep=pointer(keep),
            loss=pointer(loss),
            dz=pointer(dz),
            dz_stride=0 if dz is None else dz.stride(0),
            unscale=pointer(unscale),
            label_smoothing=target.smoothing or 0.0,
            alpha=alpha,
            beta=beta,
            softcap=transform.softcap or 0.0,
            logit_scale=transform.logit_scale,
            temperature=transform.temperature,
        )

    def _launched(self, error: int) -> None:
        if error:
            raise RuntimeError(self.library.error_string(error).decode())


def missing() -> str | None:
    """Why nothing can be emulated here."""
    return None if shutil.which("g++") else "no g++ to compile the kernels with"


def build(directory: Path, kernels: Path = KERNELS) -> Emulator:
    """Compiles the kernels into ``directory``."""
    library = directory / "rows_on_cpu.so"
    done = subprocess.run(
        ["g++", *FLAGS, f"-I{HERE}", f"-I{kernels}", HERE / "library.cpp", "-o", library],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    emulated = ctypes.CDLL(str(library))
    emulated.error_string.restype = ctypes.c_char_p
    return Emulator(emulated)
