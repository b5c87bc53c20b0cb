"""What is known of a training run: every optimiser step, and what its losses are measured by.

training_log.json holds the fields of ``TrainingLog``. It lies in every checkpoint, so that a run
that goes on knows its earlier steps, and in the run's directory once the run has ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..utils.files import read_json, write_json

TRAINING_LOG_FILE = "training_log.json"
FORMAT_VERSION = 1


@dataclass(kw_only=True)
class TrainingLog:
    """JSON values. A loss is the mean of the objective over answer tokens, in nats."""

    objective: str = "kl"
    steps: list[dict[str, Any]] = field(default_factory=list)
    """For every optimiser step: step, loss, learning_rate, and grad_norm before clipping (None
    where it was not finite, as happens to fp16)."""

    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """step and loss of each evaluation on held-out queries."""

    max_steps: int = 0
    warmup_steps: int = 0
    learning_rate: float = 0.0
    """The peak of the schedule."""

    max_grad_norm: float = 0.0
    """0: nothing is clipped."""

    context_kl: float | None = None
    """KL of the model without the context to the one with it, on some of the training queries; on
    these too, the objective's loss:"""

    loss_without_context: float | None = None
    """Of the model that is given nothing in the context's place."""

    loss_with_context: float | None = None
    """Of the teacher itself; 0 for KL."""

    loss_at_start: float | None = None
    loss_at_end: float | None = None

    prompt_change: float | None = None
    """The norm of what training added to the prompt, by the norm of what it began with."""

    answers: int = 0
    cut_answers: int = 0
    """How many of the answers are the teacher's and reached max_new_tokens."""

    max_new_tokens: int = 0
    not_finite_step: int | None = None
    """The step whose loss was not finite, which ended the run."""

    def write(self, path: Path) -> None:
        write_json(path, {"format_version": FORMAT_VERSION, **asdict(self)})

    def curve(self) -> dict[str, list[float]]:
        """The losses by step, for a picture."""
        return {
            "step": [entry["step"] for entry in self.steps],
            "loss": [entry["loss"] for entry in self.steps],
            "eval_step": [entry["step"] for entry in self.evaluations],
            "eval_loss": [entry["loss"] for entry in self.evaluations],
        }

    @classmethod
    def read(cls, path: Path) -> TrainingLog:
        """Raises ValueError naming the file and what is wrong in it; FileNotFoundError."""
        values = read_json(path)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} must have format_version {FORMAT_VERSION}: got {version!r}.")
        defaults = asdict(cls())
        for name, value in values.items():
            if name not in defaults or not _is_valid(name, value, defaults[name]):
                raise ValueError(f"{path} is damaged: see {name!r}.")
        return cls(**values)


class StepRecorder:
    """Collects what each step leaves on the device, and reads it when the Trainer logs or saves:
    reading a value makes the host wait for the device."""

    def __init__(self, log: TrainingLog) -> None:
        self.log = log
        self._loss: Tensor | None = None
        self._unread: list[tuple[int, float, Tensor, Tensor]] = []

    def add_loss(self, loss: Tensor) -> None:
        """Of one batch of the step that is under way."""
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss

    def end_step(self, step: int, grad_norm: Tensor | float, learning_rate: float) -> None:
        """Does nothing if there was no batch since the last step ended."""
        if self._loss is None:
            return
        norm = torch.as_tensor(grad_norm, device=self._loss.device).detach().float()
        self._unread.append((step, learning_rate, self._loss, norm))
        self._loss = None

    def read(self, mean: Callable[[Tensor], Tensor]) -> None:
        """mean: of a tensor [n] over the processes of the run, which call this together."""
        if not self._unread:
            return
        steps, rates, losses, norms = zip(*self._unread, strict=True)
        self._unread.clear()
        while self.log.steps and self.log.steps[-1]["step"] >= steps[0]:
            self.log.steps.pop()  # auto_find_batch_size has begun anew
        values = torch.stack([mean(torch.stack(losses)), torch.stack(norms)]).tolist()
        for step, rate, loss, norm in zip(steps, rates, *values, strict=True):
            entry = {"step": step, "loss": loss, "learning_rate": rate}
            self.log.steps.append(entry | {"grad_norm": norm if math.isfinite(norm) else None})


def _is_valid(name: str, value: Any, default: Any) -> bool:
    if isinstance(default, list):
        needed = ("step", "loss", "learning_rate") if name == "steps" else ("step", "loss")
        return isinstance(value, list) and all(
            isinstance(entry, dict)
            and all(_is_number(entry.get(key)) for key in needed)
            and (entry.get("grad_norm") is None or _is_number(entry["grad_norm"]))
            for entry in value
        )
    if isinstance(default, str):
        return isinstance(value, str)
    return _is_number(value) or (value is None and default is None)


def _is_number(value: Any) -> bool:
    """That fp32 can hold; JSON has larger ones, and NaN."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 2.0**128
