"""A ``transformers.Trainer`` whose checkpoints hold the prompt alone, and can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer_utils import TrainOutput

from ..student.soft_prompt import SoftPrompt
from .checkpoints import (
    last_good_checkpoint,
    rotate_checkpoints,
    verify_checkpoint,
    write_manifest,
)
from .log import TRAINING_LOG_FILE
from .logged_trainer import LoggedTrainer


class CheckpointedTrainer(LoggedTrainer):
    """Trains ``model.prompt``; its log lies in every checkpoint."""

    model: Any

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any
    ) -> TrainOutput:
        """resume_from_checkpoint: True takes the last good checkpoint of ``args.output_dir``.

        Raises ValueError if there is none, or if the one that is named is damaged, and
        FloatingPointError if the loss is not finite.
        """
        if resume_from_checkpoint is True:
            found = last_good_checkpoint(str(self.args.output_dir))
            if found is None:
                raise ValueError(f"{self.args.output_dir} holds no good checkpoint to resume from.")
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint, *args, **options)

    def save_prompt(self, directory: Path) -> None:
        self.model.prompt.save_pretrained(directory)

    def seal_checkpoint(self, checkpoint: Path) -> None:
        log = self.read_training_log()
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            log.write(checkpoint / TRAINING_LOG_FILE)
            write_manifest(checkpoint)
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(checkpoint.parent, limit, best)

    def load_checkpoint(self, checkpoint: Path) -> None:
        verify_checkpoint(checkpoint)
        self.load_prompt(checkpoint)
        self.load_training_log(checkpoint)

    def load_prompt(self, directory: Path) -> None:
        ours, saved = self.model.prompt, SoftPrompt.from_pretrained(directory, self.model.base)
        if saved.config != ours.config:
            raise ValueError(
                f"{directory} holds another kind of soft prompt: {saved.config}; "
                f"this run trains {ours.config}."
            )
        saved.check_template(ours.base)
        ours.load_state_dict(saved.state_dict())
