"""What stands out in a run is said while it trains, each thing once."""

from __future__ import annotations

from transformers import TrainerCallback

from ..utils.console import progress
from .diagnosis import MIN_STEPS, diagnose, steps_after_warmup
from .log import TrainingLog


class Watch(TrainerCallback):
    """Looks at the log before the first step, after a quarter of the run, and whenever the log has
    doubled since."""

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
