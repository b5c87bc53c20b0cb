"""The rows of ``make gpu``: what ``benchmarks/cases.py`` lists for it, on each backend.

Legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cases import GPU_MAIN, GPU_OTHER, LOSSES, STORED

BACKENDS = ("triton", "cuda", "streaming")
ROW_KERNEL_BACKENDS = ("triton", "cuda")


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
        return self.loss == STORED

    @property
    def streams(self) -> int:
        """Logits of the student, and of the teacher where there is one on line."""
        return self.passes - 1

    @property
    def passes(self) -> int:
        """Products with the head that the loss cannot avoid."""
        return LOSSES[self.loss].passes

    def __str__(self) -> str:
        shape = f"T={self.T} D={self.D} V={self.V}"
        return f"{self.backend}, {self.loss}, {shape}, {self.workspace_mib:g} MiB"

    def tiny(self) -> Case:
        """What a rehearsal on a CPU can do."""
        return replace(self, T=16 if self.T > 128 else 8, D=64, V=1003, target={})


def main_cases(backends: tuple[str, ...]) -> list[Case]:
    """The shapes with a target."""
    return [Case(backend=backend, **row) for row in GPU_MAIN for backend in backends]


def other_cases(backends: tuple[str, ...]) -> list[Case]:
    return [Case(backend=backend, **row) for row in GPU_OTHER for backend in backends]
