"""What ``make gpu`` times: backend, loss and shape, and what they have to reach on an H200.

Legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

BACKENDS = ("triton", "cuda", "streaming")
ROW_KERNEL_BACKENDS = ("triton", "cuda")

# How a loss is called: the public function, and its options.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "NLL": ("linear_nll", {}),
    "KL": ("linear_kl", {}),
    "KL, sketch": ("linear_kl", {}),
    "reverse KL": ("linear_kl", {"beta": 1.0}),
    "JSD": ("linear_kl", {"beta": 0.5}),
    "KL + NLL": ("linear_distill", {"alpha": 0.5}),
}


@dataclass(kw_only=True, frozen=True)
class Case:
    """One row of the results: forward and backward in bf16."""

    backend: str
    loss: str
    T: int
    D: int
    V: int
    workspace_mib: float = 256
    target: dict[str, float] = field(default_factory=dict, hash=False)
    """the most that a figure of the row may be, where there is a target"""

    @property
    def sketched(self) -> bool:
        """The teacher comes as a sketch, made before anything is timed."""
        return self.loss == "KL, sketch"

    @property
    def streams(self) -> int:
        """Logits of the student, and of the teacher where there is one on line."""
        return 1 if self.loss == "NLL" or self.sketched else 2

    @property
    def passes(self) -> int:
        """Products with the head that the loss cannot avoid."""
        return self.streams + 1

    def __str__(self) -> str:
        shape = f"T={self.T} D={self.D} V={self.V}"
        return f"{self.backend}, {self.loss}, {shape}, {self.workspace_mib:g} MiB"

    def tiny(self) -> Case:
        """What a rehearsal on a CPU can do."""
        return replace(self, T=16 if self.T > 128 else 8, D=64, V=1003, target={})


LARGE = {"ratio": 1.10}


def main_cases(backends: tuple[str, ...]) -> list[Case]:
    """The shapes with a target. peak_mib: beyond head, hidden states and their gradient.

    The fp32 form of the gradient comes on top of the workspace: the two together must fit.
    """
    qwen = {"D": 4096, "V": 151936}
    llama = {"D": 4096, "V": 128256}
    shapes: list[dict[str, Any]] = [
        {
            "loss": "NLL",
            "T": 8192,
            **qwen,
            "workspace_mib": 192,
            "target": {"milliseconds": 30, "peak_mib": 256, **LARGE},
        },
        {"loss": "KL, sketch", "T": 8192, **qwen, "workspace_mib": 192, "target": LARGE},
        {
            "loss": "KL",
            "T": 4096,
            **llama,
            "workspace_mib": 480,
            "target": {"milliseconds": 18.5, "peak_mib": 512, **LARGE},
        },
        {"loss": "NLL", "T": 128, **qwen, "target": {"graph_milliseconds": 0.75}},
        {
            "loss": "NLL",
            "T": 16384,
            "D": 2048,
            "V": 248320,
            "workspace_mib": 240,
            "target": {"peak_mib": 0.3 * 1024},
        },
    ]
    return [Case(backend=backend, **shape) for shape in shapes for backend in backends]


def other_cases(backends: tuple[str, ...]) -> list[Case]:
    """Small T, the other losses, and what more or less memory changes; the first matter most."""
    qwen = {"D": 4096, "V": 151936}
    llama = {"T": 4096, "D": 4096, "V": 128256, "workspace_mib": 512}
    shapes: list[dict[str, Any]] = [
        {"loss": "NLL", "T": T, **qwen} for T in (16, 32, 64, 256, 1024)
    ]
    shapes += [{"loss": loss, **llama} for loss in ("reverse KL", "JSD", "KL + NLL")]
    shapes += [{"loss": "KL", **{**llama, "T": T}} for T in (16, 128, 1024)]
    shapes += [{"loss": "KL, sketch", "T": T, **qwen} for T in (64, 1024)]
    shapes += [
        {"loss": "NLL", "T": 8192, **qwen},
        {"loss": "NLL", "T": 8192, **qwen, "workspace_mib": 1024},
        {"loss": "KL", **llama},
        {"loss": "NLL", "T": 512, **qwen},
    ]
    return [Case(backend=backend, **shape) for shape in shapes for backend in backends]
