"""A learning rate from a range test: it grows from step to step until the loss does.

L. N. Smith, Cyclical Learning Rates for Training Neural Networks, 2017, section 3.3.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback

from ..student.model import SoftPromptModel
from ..student.soft_prompt import SoftPrompt
from ..teacher.examples import TrainingExample
from ..teacher.teacher import Teacher
from ..utils.console import say
from .arguments import SoftPromptTrainingArguments
from .trainer import SoftPromptTrainer

# Ten steps a decade.
FIRST, LAST, STEPS = 1e-5, 1.0, 51
# The share that a running mean keeps: it spans half a decade.
KEPT = 0.8
# The test ends where the loss is so many times the least.
DIVERGED = 4.0
# A fall of the loss by less is none, and a rise above the least by less.
WON, ROSE = 0.02, 1.1


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step of the test."""

    learning_rate: float
    loss: float
    """Of the step's batch."""

    change: float
    """Running mean of the loss, by that of the prompt at the start on the same batches. These
    differ more among each other than one step from the next."""


def find_lr(*run: Any) -> None:
    """Prints a range test and the rate that it suggests. The arguments are those of it."""
    points = range_test(*run)
    Console().print(table(points))
    rate = suggested_rate(points)
    if rate is None:
        say("No learning rate lowered the loss. Nothing was trained or written.")
    else:
        say(f"Suggested: --learning_rate {rate:g}. Nothing was trained or written.")


def range_test(
    model: SoftPromptModel,
    args: SoftPromptTrainingArguments,
    examples: Sequence[TrainingExample],
    teacher: Teacher | None = None,
) -> list[Point]:
    """The steps of a training as ``args`` ask for, but for their number and learning rates.

    The prompt, all random states and ``args.output_dir`` are as before when it returns.
    Raises FloatingPointError if the loss is not finite from the start.
    """
    with tempfile.TemporaryDirectory() as directory, _undisturbed(model.prompt):
        args = copy.copy(args)
        args.output_dir, args.max_steps, args.learning_rate = directory, STEPS, FIRST
        args.save_strategy = args.eval_strategy = "no"
        args.eval_on_start = args.load_best_model_at_end = False
        args.logging_strategy, args.logging_steps, args.report_to = "steps", 1, []
        trainer = _RangeTest(model, args, train_dataset=examples, teacher=teacher)
        for wordy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(wordy)
        with tqdm(
            total=STEPS, desc="learning rates", unit="step", disable=args.disable_tqdm
        ) as trainer.bar:
            try:
                trainer.train()
            except FloatingPointError:
                # Else the rate is as high as it gets.
                if not trainer.points:
                    raise
        return trainer.points


class _RangeTest(SoftPromptTrainer):
    """Each batch is read twice: by the prompt as it is, and as it was at the start."""

    bar: tqdm

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.points: list[Point] = []
        self._loss_at_start = self._mean = self._mean_at_start = 0.0
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.create_optimizer(), lambda step: (LAST / FIRST) ** (step / (STEPS - 1))
        )

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        prompt = self.model.prompt.embedding
        now = prompt.data
        try:
            prompt.data = self._start
            with torch.no_grad():
                self._loss_at_start += super().compute_loss(*args, **options).item()
        finally:
            prompt.data = now
        return super().compute_loss(*args, **options)

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        super().log(logs, *args, **options)
        if "loss" not in logs:
            return
        self.bar.update()
        # Their common bias towards 0 cancels.
        self._mean = KEPT * self._mean + logs["loss"]
        self._mean_at_start = KEPT * self._mean_at_start + self._loss_at_start
        self._loss_at_start = 0.0
        change = self._mean / self._mean_at_start
        self.points.append(
            Point(learning_rate=logs["learning_rate"], loss=logs["loss"], change=change)
        )
        if change > DIVERGED * min(point.change for point in self.points):
            self.control.should_training_stop = True


def suggested_rate(points: Sequence[Point]) -> float | None:
    """A tenth of the rate at which the loss was least, to one digit; None where none lowered it.

    At the least loss, steps already are so long that they undo each other. What comes after the
    first rise does not count: there the loss may fall again by chance.
    """
    least = None
    for point in points:
        if least is None or point.change < least.change:
            least = point
        elif point.change > ROSE * least.change:
            break
    if least is None or least.change > 1 - WON:
        return None
    return float(f"{least.learning_rate / 10:.0e}")


def table(points: Sequence[Point]) -> Table:
    """Every fifth step of the test, for ``rich`` to print."""
    result = Table(title="learning-rate range test", title_justify="left")
    for heading in ("learning rate", "loss of the batch", "change of the mean loss"):
        result.add_column(heading, justify="right")
    for point in points[::-5][::-1]:
        result.add_row(
            f"{point.learning_rate:.1e}", f"{point.loss:.3f}", f"{point.change - 1:+.1%}"
        )
    return result


@contextmanager
def _undisturbed(prompt: SoftPrompt) -> Iterator[None]:
    start = prompt.embedding.detach().clone()
    python, array = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(array)
        with torch.no_grad():
            prompt.embedding.copy_(start)
        prompt.embedding.grad = None
