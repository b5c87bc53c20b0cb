"""A ``transformers.Trainer`` that keeps a log of every step, whatever ``logging_steps`` is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import TrainOutput

from .log import TRAINING_LOG_FILE, StepRecorder, TrainingLog
from .trainer_hooks import HookedTrainer


class LoggedTrainer(HookedTrainer):
    """Fills ``training_log`` without making the host wait for the device at other times than it
    does anyway: when the Trainer logs, when it saves, and at the end."""

    def __init__(self, *, model: Any, **options: Any) -> None:
        super().__init__(model=model, **options)
        self.training_log = TrainingLog()
        self._recorder = StepRecorder(self.training_log)
        self._prompt = model.prompt
        self._start = model.prompt.embedding.detach().clone()

    def train(self, *args: Any, **options: Any) -> TrainOutput:
        self.training_log.steps, self.training_log.evaluations = [], []
        try:
            result = super().train(*args, **options)
        except FloatingPointError:
            # The other processes may not have failed: they would not answer.
            self._recorder.read(mean=lambda losses: losses)
            self._note_options()
            self.training_log.not_finite_step = self.state.global_step
            raise
        self.read_training_log()
        return result

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        self._recorder.add_loss(loss)
        return loss

    def end_step(self, grad_norm: Tensor | float, learning_rate: float) -> None:
        self._recorder.end_step(self.state.global_step, grad_norm, learning_rate)
        if self.control.should_log:
            self.read_training_log()

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if self.is_in_train and "eval_loss" in logs:
            entry = {"step": self.state.global_step, "loss": logs["eval_loss"]}
            self.training_log.evaluations.append(entry)
        super().log(logs, *args, **options)

    def read_training_log(self) -> TrainingLog:
        """The log with all steps up to now. The processes of a run call this together."""
        self._recorder.read(mean=lambda losses: self.accelerator.gather(losses[None]).mean(dim=0))
        self._note_options()
        return self.training_log

    def _note_options(self) -> None:
        log, args = self.training_log, self.args
        log.objective = getattr(args, "objective", log.objective)
        log.learning_rate, log.max_grad_norm = args.learning_rate, args.max_grad_norm
        log.max_steps = self.state.max_steps
        log.warmup_steps = args.get_warmup_steps(log.max_steps)
        added = self._prompt.embedding.detach() - self._start
        change = (added.norm() / self._start.norm()).item()
        log.prompt_change = change if math.isfinite(change) else None

    def load_training_log(self, checkpoint: Path) -> None:
        """Take the steps of a run that goes on; earlier versions wrote none."""
        file = checkpoint / TRAINING_LOG_FILE
        if file.is_file():
            earlier = TrainingLog.read(file)
            self.training_log.steps = earlier.steps
            self.training_log.evaluations = earlier.evaluations
