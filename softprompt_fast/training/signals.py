"""SIGINT and SIGTERM: stop soon, lose nothing."""

from __future__ import annotations

import signal
from typing import Any

import torch
from transformers import TrainerCallback

from ..utils.console import progress


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
