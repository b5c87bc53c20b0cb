"""The one table of what is timed: heads, losses, lengths, dtypes, and which go together.

It imports nothing but the standard library: the driver of ``make gpu`` reads it too.

Legend: T tokens, D hidden width, V vocabulary. A *pass* is one product of T x D with the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

# Of real models: (D, V).
HEADS = {
    "SmolLM2-135M": (576, 49152),
    "Qwen2.5-0.5B": (896, 151936),
    "Llama-3.2-1B": (2048, 128256),
    "Gemma-3-1B": (1152, 262144),
    "Llama-3-8B": (4096, 128256),
}
# Of the losses, and their names in the tables, in which the first comes first: it is what most run.
DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
# In which a whole model trains, and how time and memory grow: most CPUs only emulate 16 bits.
DEVICE_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}


@dataclass(kw_only=True, frozen=True)
class Shape:
    model: str
    T: int
    D: int
    V: int

    @classmethod
    def of(cls, model: str, T: int) -> Shape:
        D, V = HEADS[model]
        return cls(model=model, T=T, D=D, V=V)

    @property
    def pass_flop(self) -> float:
        return 2.0 * self.T * self.D * self.V

    def __str__(self) -> str:
        return f"{self.model} T={self.T} D={self.D} V={self.V}"


class LossCase(NamedTuple):
    """A public function with its options."""

    function: str
    options: dict[str, Any]
    passes: int
    """that the loss cannot avoid"""


# What is known of the teacher was computed before, in the form that the implementation takes.
STORED = "KL, stored teacher"
LOSSES = {
    "NLL": LossCase("linear_nll", {}, 2),
    "KL": LossCase("linear_kl", {}, 3),
    STORED: LossCase("linear_kl", {}, 2),
    "reverse KL": LossCase("linear_kl", {"beta": 1.0}, 3),
    "JSD": LossCase("linear_kl", {"beta": 0.5}, 3),
    "KL + NLL": LossCase("linear_distill", {"alpha": 0.5}, 3),
}
# The losses that training uses.
MAIN = ["NLL", "KL", STORED]

OURS, PLAIN = "softprompt_fast", "PyTorch"

# make bench: shapes and their losses, for every implementation that has them, in both dtypes. Few
# tokens come with every loss: the first shape is the one that a CPU without bf16 gets through.
QUICK = [
    (Shape.of("SmolLM2-135M", 16), list(LOSSES)),
    (Shape.of("SmolLM2-135M", 128), MAIN),
    (Shape.of("Qwen2.5-0.5B", 16), ["KL"]),
    (Shape.of("Gemma-3-1B", 16), MAIN),
]
FULL = [
    (Shape.of(model, T), list(LOSSES) if T in (256, 4096) else MAIN)
    for T in (16, 64, 256, 1024, 4096, 16384)
    for model in HEADS
]
# A pass of 16384 tokens over the largest head takes 0.05 s on an H200, and minutes on two cores.
MAX_PASS_FLOP = {"cuda": 1e14, "cpu": 1e12}
# Of PyTorch's product back, where 16 bits are multiplied in plain loops: minutes for a large head.
MAX_PRODUCT_SECONDS = 4.0

# make bench: what grows, and who is measured while it does.
GROWTH_SCALE = {"cuda": 16, "cpu": 1}  # times as many tokens
GROWTH_LOSSES = {OURS: MAIN, PLAIN: ["KL"]}


def growth_shapes(scale: int) -> dict[str, list[Shape]]:
    return {
        "T": [Shape.of("SmolLM2-135M", scale * T) for T in (32, 128, 512)],
        "V": [Shape(model="any", T=scale * 32, D=576, V=V) for V in (32768, 131072, 262144)],
    }


# make gpu: loss, shape and workspace, and what they have to reach on an H200: the most that a
# figure may be. peak_mib: beyond head, hidden states and their gradient. The fp32 form of the
# gradient comes on top of the workspace: the two together must fit.
QWEN = {"D": 4096, "V": 151936}
LLAMA = dict(zip("DV", HEADS["Llama-3-8B"], strict=True))
LARGE = {"ratio": 1.10}
GPU_MAIN: list[dict[str, Any]] = [
    {
        "loss": "NLL",
        "T": 8192,
        **QWEN,
        "workspace_mib": 192,
        "target": {"milliseconds": 30, "peak_mib": 256, **LARGE},
    },
    {"loss": STORED, "T": 8192, **QWEN, "workspace_mib": 192, "target": LARGE},
    {
        "loss": "KL",
        "T": 4096,
        **LLAMA,
        "workspace_mib": 480,
        "target": {"milliseconds": 18.5, "peak_mib": 512, **LARGE},
    },
    {"loss": "NLL", "T": 128, **QWEN, "target": {"graph_milliseconds": 0.75}},
    {
        "loss": "NLL",
        "T": 16384,
        "D": 2048,
        "V": 248320,
        "workspace_mib": 240,
        "target": {"peak_mib": 0.3 * 1024},
    },
]
# Small T, the other losses, and what more or less memory changes; the first matter most.
LLAMA_512 = {**LLAMA, "workspace_mib": 512}
GPU_OTHER: list[dict[str, Any]] = [
    *({"loss": "NLL", "T": T, **QWEN} for T in (16, 32, 64, 256, 1024)),
    *({"loss": loss, "T": 4096, **LLAMA_512} for loss in ("reverse KL", "JSD", "KL + NLL")),
    *({"loss": "KL", "T": T, **LLAMA_512} for T in (16, 128, 1024)),
    *({"loss": STORED, "T": T, **QWEN} for T in (64, 1024)),
    {"loss": "NLL", "T": 8192, **QWEN},
    {"loss": "NLL", "T": 8192, **QWEN, "workspace_mib": 1024},
    {"loss": "KL", "T": 4096, **LLAMA_512},
    {"loss": "NLL", "T": 512, **QWEN},
]
# The row kernels alone: rows of a chunk, and the vocabulary of each loss.
GPU_ROWS = 384
GPU_ROW_VOCABULARIES = {
    "NLL": QWEN["V"],
    "KL": LLAMA["V"],
    "reverse KL": LLAMA["V"],
    "JSD": LLAMA["V"],
}
