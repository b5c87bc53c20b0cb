"""One training run in its output directory: from its last checkpoint to the saved prompt."""

from __future__ import annotations

import time
import warnings

import torch
import transformers
from transformers import PrinterCallback, ProgressCallback

from ..student.model import SoftPromptModel
from ..student.soft_prompt import SoftPrompt
from ..utils.console import progress, say
from ..utils.files import named_failures
from .arguments import SoftPromptTrainingArguments
from .baselines import Yardstick
from .checkpoints import last_good_checkpoint, rotate_checkpoints
from .diagnosis import diagnose
from .log import TRAINING_LOG_FILE
from .progress import TrainingProgress
from .run_directory import RunDirectory
from .setup import Lessons
from .signals import StopOnSignal
from .trainer import SoftPromptTrainer
from .watch import Watch


def train_prompt(
    student: SoftPromptModel,
    lessons: Lessons,
    args: SoftPromptTrainingArguments,
    directory: RunDirectory,
    stop: StopOnSignal,
    *,
    anew: bool,
) -> int:
    """Trains ``student.prompt``, or goes on with it, and saves it; the exit code.

    anew: the user asked for it, so the same command would not go on after a stop.
    """
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
    yardstick = Yardstick(trainer, lessons.teacher, lessons.train_set)
    yardstick.measure_start()
    directory.start()
    trainer.accelerator.wait_for_everyone()
    return _run(trainer, student.prompt, directory, stop, yardstick, anew=anew)


def _run(
    trainer: SoftPromptTrainer,
    prompt: SoftPrompt,
    directory: RunDirectory,
    stop: StopOnSignal,
    yardstick: Yardstick,
    *,
    anew: bool,
) -> int:
    checkpoint = trainer.args.resume_from_checkpoint
    if checkpoint is None:
        with warnings.catch_warnings(record=True) as skipped:
            warnings.simplefilter("always", UserWarning)
            last = last_good_checkpoint(directory.path)
            checkpoint = None if last is None else str(last)
        for warning in skipped:
            progress(str(warning.message))
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
            trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError:
        _write_log(trainer, directory)
        raise
    seconds = time.perf_counter() - started
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if stop.received is not None and step < steps:
        _write_log(trainer, directory)
        say(f"Stopped after step {step} of {steps}, with a checkpoint in {directory.path}.")
        flag = "overwrite_output_dir" if anew else "resume_from_checkpoint"
        restarts = anew or trainer.args.resume_from_checkpoint
        say(f"The same command{f' without --{flag}' if restarts else ''} goes on from there.")
        return stop.exit_code
    if trainer.args.should_save:
        # A run that was killed after its last save, and before or in its rotation, is over by now.
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(directory.path, trainer.args.save_total_limit, best)
        prompt.save_pretrained(directory.path)
    yardstick.measure_end()
    _write_log(trainer, directory)
    directory.finish(
        objective=trainer.args.objective,
        steps=step,
        seconds=round(seconds, 1),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )
    say(f"Trained {step - shown.first_step} steps in {seconds:.0f} s.")
    say(f"The soft prompt ({len(prompt.embedding)} virtual tokens) is in {directory.path}")
    for finding in diagnose(trainer.training_log):
        if not finding.is_note:
            say(f"What stands out: {finding}")
    return 0 if stop.received is None else stop.exit_code


def _write_log(trainer: SoftPromptTrainer, directory: RunDirectory) -> None:
    if trainer.args.should_save:
        trainer.training_log.write(directory.path / TRAINING_LOG_FILE)
