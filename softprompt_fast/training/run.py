"""One training run in its output directory: from its last checkpoint to the saved prompt."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch
import transformers
from transformers import PrinterCallback, ProgressCallback

from ..student.model import SoftPromptModel
from ..utils.console import progress, say
from ..utils.files import named_failures
from .arguments import SoftPromptTrainingArguments
from .baselines import Baselines
from .callbacks import StopOnSignal, TrainingProgress, Watch
from .checkpoints import last_good_checkpoint, rotate_checkpoints
from .diagnosis import diagnose
from .log import TRAINING_LOG_FILE
from .run_directory import RunDirectory
from .setup import Lessons
from .trainer import SoftPromptTrainer


def checkpoint_to_go_on_from(
    args: SoftPromptTrainingArguments, directory: RunDirectory
) -> Path | None:
    """The one that the user names, or else the last good one; None where there is none."""
    if directory.overwrite:
        return None
    if args.resume_from_checkpoint is not None:
        return Path(args.resume_from_checkpoint)
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always", UserWarning)
        checkpoint = last_good_checkpoint(directory.path)
    for warning in skipped:
        progress(str(warning.message))
    return checkpoint


def train_prompt(
    student: SoftPromptModel,
    lessons: Lessons,
    args: SoftPromptTrainingArguments,
    directory: RunDirectory,
    stop: StopOnSignal,
    *,
    anew: bool,
    checkpoint: Path | None,
) -> int:
    """Trains ``student.prompt``, or goes on with it, and saves it; the exit code.

    anew: the user asked for it, so the same command would not go on after a stop. checkpoint: as
    ``checkpoint_to_go_on_from`` found it before.
    """
    trainer = _make_trainer(student, lessons, args, stop)
    baselines = Baselines(trainer, lessons.teacher, lessons.train_set)
    baselines.measure_start()
    directory.start()
    trainer.accelerator.wait_for_everyone()

    first_step, seconds = _train(trainer, checkpoint, directory)
    if stop.received is not None and trainer.state.global_step < trainer.state.max_steps:
        _write_log(trainer, directory)
        _say_how_to_go_on(trainer, directory, anew=anew)
        return stop.exit_code

    _save(trainer, directory)
    baselines.measure_end()
    _write_log(trainer, directory)
    directory.finish(
        objective=args.objective,
        steps=trainer.state.global_step,
        seconds=round(seconds, 1),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    _say_what_came_of_it(trainer, directory, trainer.state.global_step - first_step, seconds)
    return 0 if stop.received is None else stop.exit_code


def _make_trainer(
    student: SoftPromptModel,
    lessons: Lessons,
    args: SoftPromptTrainingArguments,
    stop: StopOnSignal,
) -> SoftPromptTrainer:
    args.dataloader_pin_memory = args.device.type == "cuda"  # elsewhere it is a mere warning
    trainer = SoftPromptTrainer(
        model=student,
        args=args,
        train_dataset=lessons.train_set,
        eval_dataset=lessons.eval_set,
        teacher=lessons.asked,
        callbacks=[stop],
    )
    log = trainer.training_log
    log.answers, log.cut_answers = len(lessons.train_set), lessons.cut_answers
    log.max_new_tokens = lessons.teacher.max_new_tokens
    return trainer


def _train(
    trainer: SoftPromptTrainer, checkpoint: Path | None, directory: RunDirectory
) -> tuple[int, float]:
    """To the last step, or to the one at which a signal comes: the first step, and the seconds."""
    if checkpoint is not None:
        progress(f"Going on from {checkpoint}")
    shown = TrainingProgress(show_bar=not trainer.args.disable_tqdm)
    for wordy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(wordy)
    trainer.add_callback(shown)
    trainer.add_callback(Watch(trainer.training_log))
    started = time.perf_counter()
    try:
        with named_failures(directory.path):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except FloatingPointError:
        _write_log(trainer, directory)
        raise
    return shown.first_step, time.perf_counter() - started


def _save(trainer: SoftPromptTrainer, directory: RunDirectory) -> None:
    args = trainer.args
    if args.should_save:
        # A run that was killed after its last save, and before or in its rotation, is over by now.
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(directory.path, args.save_total_limit, best)
        trainer.model.prompt.save_pretrained(directory.path)


def _write_log(trainer: SoftPromptTrainer, directory: RunDirectory) -> None:
    if trainer.args.should_save:
        trainer.training_log.write(directory.path / TRAINING_LOG_FILE)


def _say_how_to_go_on(trainer: SoftPromptTrainer, directory: RunDirectory, *, anew: bool) -> None:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    say(f"Stopped after step {step} of {steps}, with a checkpoint in {directory.path}.")
    flag = "overwrite_output_dir" if anew else "resume_from_checkpoint"
    restarts = anew or trainer.args.resume_from_checkpoint
    say(f"The same command{f' without --{flag}' if restarts else ''} goes on from there.")


def _say_what_came_of_it(
    trainer: SoftPromptTrainer, directory: RunDirectory, steps: int, seconds: float
) -> None:
    length = len(trainer.model.prompt.embedding)
    say(f"Trained {steps} steps in {seconds:.0f} s.")
    say(f"The soft prompt ({length} virtual tokens) is in {directory.path}")
    for finding in diagnose(trainer.training_log):
        if not finding.is_note:
            say(f"What stands out: {finding}")
