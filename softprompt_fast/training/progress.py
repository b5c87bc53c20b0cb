"""How a training run looks on the screen: one bar, and a short line for each log entry."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

SHOWN = {"loss": "loss", "eval_loss": "loss on eval_file", "learning_rate": "learning rate"}


class TrainingProgress(TrainerCallback):
    """In place of the Trainer's own callbacks, which print whole dictionaries."""

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
