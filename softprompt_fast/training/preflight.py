"""What can be known to be wrong with a training run before its model loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations

from ..student.model import SoftPromptModel
from ..student.soft_prompt import SoftPromptConfig
from ..teacher.examples import TrainingExample
from ..teacher.teacher import Teacher
from ..utils.errors import OptionError
from .arguments import SoftPromptTrainingArguments, TrainOptions
from .checkpoints import verify_checkpoint
from .teacher_store import choose_store, sketch_problem

METRICS = (None, "loss", "eval_loss")


def check_arguments(
    options: TrainOptions, config: SoftPromptConfig, args: SoftPromptTrainingArguments
) -> None:
    """Raises OptionError naming options that do not go together, or a package that is missing."""
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    if evaluates and options.eval_file is None:
        raise OptionError("eval_strategy and eval_on_start need --eval_file")
    if args.metric_for_best_model not in METRICS:
        raise OptionError(f"metric_for_best_model must be loss: got {args.metric_for_best_model!r}")
    if args.save_strategy == "best" and not (evaluates and args.metric_for_best_model):
        raise OptionError(
            "save_strategy best needs --eval_strategy and --metric_for_best_model=loss"
        )
    if options.overwrite_output_dir and args.resume_from_checkpoint:
        raise OptionError(
            "--overwrite_output_dir trains anew, and --resume_from_checkpoint does not: give one"
        )
    if options.find_lr and args.world_size > 1:
        raise OptionError(
            f"find_lr runs in one process: got {args.world_size}. Start it without a launcher, and "
            "multiply gradient_accumulation_steps by their number for batches of the same size"
        )
    choose_store(options.teacher_store, args, top_k=options.teacher_top_k, head=None)
    if options.teacher_cache is not None:
        _check_apart(str(args.output_dir), options.teacher_cache)
    if not -(2**63) <= config.prompt_seed < 2**64:
        raise OptionError(f"prompt_seed must fit into 64 bits: got {config.prompt_seed}")
    for name in args.report_to or ():
        if name not in get_available_reporting_integrations():
            raise OptionError(f"report_to {name}: there is no such package installed")
    _check_optimizer(args)


def check_data(args: SoftPromptTrainingArguments, num_queries: int) -> None:
    """Raises ValueError if there is nothing to train on, or to go on from."""
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and num_queries < batch:
        raise ValueError(
            f"dataloader_drop_last leaves nothing to train on: {num_queries} queries are less "
            f"than a batch of {batch}. Lower per_device_train_batch_size."
        )
    if args.resume_from_checkpoint:
        verify_checkpoint(args.resume_from_checkpoint)


def _check_apart(output_dir: str, teacher_cache: str) -> None:
    run, cache = Path(output_dir).resolve(), Path(teacher_cache).resolve()
    if run == cache or run in cache.parents:
        raise OptionError(
            f"teacher_cache {teacher_cache} lies in output_dir {output_dir}, which is of this run "
            "alone: choose a directory beside it"
        )


def _check_optimizer(args: SoftPromptTrainingArguments) -> None:
    """Makes an optimiser and a schedule of the kind asked for, of one number."""
    optim, schedule = (str(getattr(x, "value", x)) for x in (args.optim, args.lr_scheduler_type))
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise OptionError(f"optim {optim}, optim_args {args.optim_args}: {error}") from error
    options: Any = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(
            schedule,
            torch.optim.SGD([torch.zeros(1)]),
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=dict(options),
        )
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"lr_scheduler_type {schedule}, lr_scheduler_kwargs {options}: {error}"
        ) from error


def check_examples(
    name: str,
    dataset: Sequence[TrainingExample],
    model: SoftPromptModel,
    args: SoftPromptTrainingArguments,
    teacher: Teacher | None = None,
) -> None:
    """Raises TypeError or ValueError, naming ``name`` or the example, if ``dataset`` cannot be
    learned: it is empty, too long for the model, or lacks what the objective needs, which a
    ``teacher`` may be asked for instead."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{name} must be a list of TrainingExample: got {type(dataset).__name__}, which is "
            "read once and in one order. Call list() on it."
        )
    if not len(dataset):
        raise ValueError(f"{name} has no examples: give at least one, or leave it out.")
    for example in dataset:
        if not isinstance(example, TrainingExample):
            raise TypeError(
                f"{name} must hold TrainingExample: got {type(example).__name__}. "
                "Call softprompt_fast.make_examples."
            )
        if args.needs_teacher_states and teacher is None:
            _check_teacher_is_known(example, args, model.head.softcap)
        model.check_length(example.query, len(example.answer.ids))


def _check_teacher_is_known(
    example: TrainingExample, args: SoftPromptTrainingArguments, softcap: float | None
) -> None:
    name, answer = example.query.source or "an example", example.answer
    if answer.hidden is None and answer.sketch is None:
        raise ValueError(
            f"objective={args.objective!r} needs the teacher's hidden states or sketches: "
            f"{name} has none. Call Teacher.answer(..., record_hidden=True), or give the trainer a "
            "teacher."
        )
    problem = sketch_problem(args, softcap) if answer.sketch is not None else None
    if problem is not None:
        raise ValueError(
            f"{name} holds a sketch of the teacher: {problem}. "
            "Call Teacher.answer(..., record_hidden=True) without sketch."
        )
