"""Which backends there are, which of them can run here, and which one "auto" takes."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_C: ModuleType | None
_cpp_problem: str | None
try:
    _C = importlib.import_module("softprompt_fast._C")
    _cpp_problem = None
except ImportError as error:
    _C = None
    _cpp_problem = f"the compiled extension is missing ({error}); install with a C++ compiler"

# The fastest first: "auto" takes the first that can run on the tensors' device.
PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("torch",)}


def available() -> dict[str, str | None]:
    """For each backend None where it can be used, else the reason why not."""
    return {
        "torch": None,
        "cpp": _cpp_problem,
        "triton": "its kernels are not part of this version",
        "cuda": "its kernels are not part of this version",
    }


def build_info() -> dict[str, str]:
    """How the extension was compiled and which instruction set it uses here; empty without one."""
    return {} if _C is None else _C.build_info()


def resolve(name: str, device: torch.device) -> str:
    """The backend that will run: ``name`` itself, or for "auto" the fastest for ``device``.

    Raises ValueError for an unknown name, RuntimeError with the reason why a named one cannot run.
    """
    problems = available()
    if name == "auto":
        candidates = PREFERENCE.get(device.type, ("torch",))
        return next(backend for backend in candidates if problems[backend] is None)
    if name not in problems:
        raise ValueError(f"backend must be auto, {', '.join(problems)}: got {name!r}.")
    if (reason := problems[name]) is not None:
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}.")
    if name == "cpp" and device.type != "cpu":
        raise RuntimeError(f"backend 'cpp' runs on the CPU only: the tensors are on {device}.")
    return name
