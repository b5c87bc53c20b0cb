"""What happens besides training: progress on the screen, findings as they come, stops by signal."""

from __future__ import annotations

import signal
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..utils.console import progress
from .diagnosis import MIN_STEPS, diagnose, steps_after_warmup
from .log import TrainingLog

SHOWN = {"loss": "loss", "eval_loss": "loss on eval_file", "learning_rate": "learning rate"}


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM end the training after the step, with a checkpoint.

    Outside training there is nothing to save: the signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_training = False
        self.previous: dict[int, Any] = {}

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        while self.previous:
            signal.signal(*self.previous.popitem())

    @property
    def exit_code(self) -> int:
        return 128 + (self.received or 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_training = True

    def on_train_end(self, args, state, control, **kwargs):
        self.is_training = False

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # A signal may reach the processes in different steps; they have to stop after one.
            received = torch.tensor(self.received or 0, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received) or None
        if self.received is not None:
            control.should_save = control.should_training_stop = True

    def _handle(self, number: int, frame: Any) -> None:
        if not self.is_training or self.received is not None:
            raise SystemExit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        progress(f"{name}: saving after this step; once more to stop without saving")


class TrainingProgress(TrainerCallback):
    """One bar, and a short line for each log entry: the Trainer's own callbacks print whole
    dictionaries."""

    def __init__(self, *, show_bar: bool) -> None:
        self.show_bar = show_bar
        self.bar: Any = None
        self.first_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not self.show_bar,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = [f"{text} {logs[name]:.4g}" for name, text in SHOWN.items() if name in logs]
        if values and state.is_world_process_zero:
            tqdm.write(f"step {state.global_step}: {', '.join(values)}")


class Watch(TrainerCallback):
    """Says what stands out in a run while it trains, each thing once.

    Looks at the log before the first step, after a quarter of the run, and whenever the log has
    doubled since.
    """

    def __init__(self, log: TrainingLog) -> None:
        self.log = log
        self.said: set[str] = set()
        self.next_look = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._say_what_is_new()

    def on_log(self, args, state, control, **kwargs):
        steps = steps_after_warmup(self.log)
        if steps >= max(MIN_STEPS, state.max_steps / 4, self.next_look):
            self.next_look = 2 * steps
            self._say_what_is_new()

    def _say_what_is_new(self) -> None:
        for finding in diagnose(self.log):
            # Cut answers are counted where they are made.
            if finding.kind not in self.said and not finding.is_note:
                progress(str(finding))
                self.said.add(finding.kind)
