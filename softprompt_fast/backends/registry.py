"""The backends: their engines, which of them can run here, and which one "auto" takes."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, gpu_rows, gpu_streaming, pytorch
from .problem import Problem

_C: ModuleType | None
_cpp_problem: str | None
try:
    _C = importlib.import_module("softprompt_fast._C")
    _cpp_problem = None
except ImportError as error:
    _C = None
    _cpp_problem = f"the compiled extension is missing ({error}); install with a C++ compiler"

# The fastest first: "auto" takes the first that can run on the tensors' device.
PREFERENCE = {"cpu": ("cpp", "torch"), "cuda": ("triton", "cuda", "torch")}
# What a backend needs its tensors on; "torch" takes any.
DEVICES = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda", "streaming": "cuda"}
LEAST_CAPABILITY = (8, 0)


def available() -> dict[str, str | None]:
    """For each backend None where it can be used, else the reason why not."""
    return {name: problem() for name, problem in _PROBLEMS.items()}


def interpreted() -> bool:
    """Do Triton kernels run in Triton's interpreter, on tensors of any device? A slow rehearsal."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install softprompt_fast[triton]"
    return None if interpreted() else _gpu_problem()


def _cuda_problem() -> str | None:
    if _cpp_problem is not None:
        return _cpp_problem
    if "cuda" not in build_info():
        return f"the extension was built without CUDA kernels: {build_info()['no_cuda']}"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    return _gpu_problem()


def _gpu_problem() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU was found"
    if torch.version.hip is None and torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return "the GPU is older than compute capability 8.0"
    return None


# Asked one by one: a loss on the CPU must not start CUDA.
_PROBLEMS: dict[str, Callable[[], str | None]] = {
    "torch": lambda: None,
    "cpp": lambda: _cpp_problem,
    "triton": _triton_problem,
    "cuda": _cuda_problem,
    "streaming": _triton_problem,
}


def build_info() -> dict[str, str]:
    """How the extension was compiled and which instruction set it uses here; empty without one."""
    return {} if _C is None else _C.build_info()


# what can run here does not change
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def resolve(name: str, device: torch.device) -> str:
    """The backend that will run: ``name`` itself, or for "auto" the fastest for ``device``.

    Raises ValueError for an unknown name, RuntimeError with the reason why a named one cannot run.
    """
    if name == "auto":
        candidates = PREFERENCE.get(device.type, ("torch",))
        return next(backend for backend in candidates if _PROBLEMS[backend]() is None)
    if name not in _PROBLEMS:
        raise ValueError(f"backend must be auto, {', '.join(_PROBLEMS)}: got {name!r}.")
    if (reason := _PROBLEMS[name]()) is not None:
        raise RuntimeError(f"backend {name!r} cannot be used: {reason}.")
    wanted = DEVICES.get(name, device.type)
    if device.type != wanted and not (wanted == "cuda" and interpreted()):
        kind = {"cpu": "the CPU", "cuda": "a GPU"}[wanted]
        raise RuntimeError(f"backend {name!r} runs on {kind} only: the tensors are on {device}.")
    return name


Engine = Callable[[Problem], tuple[Tensor, Tensor]]


def _over_kept_tokens(engine: Engine) -> Engine:
    """Ignored tokens cost nothing; which they are has to be known on the host."""

    def token_loss(problem: Problem) -> tuple[Tensor, Tensor]:
        keep = problem.keep
        if keep is None or keep.all():
            return engine(problem._replace(keep=None))
        loss, dhidden = engine(problem.kept_tokens())
        return _scatter(loss, keep), _scatter(dhidden, keep) if problem.with_grad else dhidden

    return token_loss


def _scatter(rows: Tensor, keep: Tensor) -> Tensor:
    out = rows.new_zeros((keep.shape[0], *rows.shape[1:]))
    out[keep] = rows
    return out


# The engines of a GPU leave ignored tokens to their kernels and never wait for the device.
ENGINES: dict[str, Engine] = {
    "torch": _over_kept_tokens(pytorch.token_loss),
    "cpp": _over_kept_tokens(cpu.token_loss),
    "triton": gpu_rows.triton_token_loss,
    "cuda": gpu_rows.cuda_token_loss,
    "streaming": gpu_streaming.token_loss,
}
