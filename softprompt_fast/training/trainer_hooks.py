"""Private methods of ``transformers.Trainer`` under public names: no other file knows them.

tests/training/test_private_trainer_methods.py holds that each is still there, takes what is passed
here, and is called by the Trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer


class HookedTrainer(Trainer):
    # Of subclasses

    def end_step(self, grad_norm: Tensor | float, learning_rate: float) -> None:
        """After every step, before the Trainer logs or saves it; and once more after an epoch."""

    def save_prompt(self, directory: Path) -> None:
        """What is learned, to resume from and to be used. One process of a run calls this."""
        raise NotImplementedError

    def load_prompt(self, directory: Path) -> None:
        raise NotImplementedError

    def load_checkpoint(self, checkpoint: Path) -> None:
        """What ``save_prompt`` and ``seal_checkpoint`` wrote."""
        raise NotImplementedError

    def seal_checkpoint(self, checkpoint: Path) -> None:
        """All that the Trainer writes is there. The processes of a run call this together."""
        raise NotImplementedError

    # Called: what the Trainer does for its own loops, and offers to nobody else

    def train_sampler(self) -> Sampler[int] | None:
        """The order of the examples, by which a run with several processes reads those of one."""
        return self._get_train_sampler()

    def prepare_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device, which ``evaluation_loop`` has to see to as it replaces one."""
        return cast(dict[str, Any], self._prepare_inputs(batch))

    # Overridden: nothing public is called at these moments, or can be told to do otherwise

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """A run that was killed after its last save has no step left; Trainer would do another."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, *args: Any, **options: Any
    ) -> None:
        """Callbacks are not told the norm of the gradient, unless the Trainer logs the step."""
        self.end_step(grad_norm, options["learning_rate"])
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **options)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The Trainer would save the base model as well, and a pickle of the arguments."""
        if self.args.should_save:
            self.save_prompt(Path(output_dir or str(self.args.output_dir)))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer would delete older checkpoints before this one can be trusted."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        run_dir = Path(self._get_output_dir(trial=trial))
        self.seal_checkpoint(run_dir / f"checkpoint-{self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any | None = None) -> None:
        """The Trainer would look for the weights of a whole model."""
        self.load_checkpoint(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """The same, at the end of a run."""
        self.load_prompt(Path(str(self.state.best_model_checkpoint)))
