"""The command ``train``: have the teacher answer the queries, train a soft prompt, save it."""

from __future__ import annotations

import atexit

import torch

from ...student.model import SoftPromptModel
from ...student.soft_prompt import SoftPrompt, SoftPromptConfig
from ...teacher.cache import TeacherCache
from ...training.arguments import SoftPromptTrainingArguments, TrainOptions
from ...training.lr_finder import find_lr
from ...training.preflight import check_arguments, check_data
from ...training.run import train_prompt
from ...training.setup import load, open_directory, read_data, teach
from ...utils.console import say
from ..command import Command, Invocation


def train(
    options: TrainOptions,
    config: SoftPromptConfig,
    args: SoftPromptTrainingArguments,
    invocation: Invocation,
) -> int:
    """The exit code. A run is continued only by the options that it began with.

    Raises ValueError or OSError, before the model loads wherever that can be known.
    """
    check_arguments(options, config, args)
    data = read_data(options)
    check_data(args, len(data.records))
    directory = None
    if not options.find_lr:
        directory = open_directory(options, args, data, invocation.changed)
    if directory is not None and directory.is_finished:
        say(f"{directory.path} holds the soft prompt of this run: nothing is left to train.")
        say("Pass --overwrite_output_dir to train anew.")
        return 0

    if args.world_size > 1:
        atexit.register(_leave_process_group)
    cache = None if options.teacher_cache is None else TeacherCache(options.teacher_cache)
    args.disable_tqdm = args.disable_tqdm or args.process_index != 0
    model, tokenizer = load(options, args)
    prompt = SoftPrompt.from_model(model, tokenizer, config, data.first_context)
    lessons = teach(model, tokenizer, options, args, data, cache)
    student = SoftPromptModel(model, prompt)
    if directory is None:
        find_lr(student, args, lessons.train_set, lessons.asked)
        return 0
    anew = options.overwrite_output_dir
    return train_prompt(student, lessons, args, directory, invocation.stop, anew=anew)


def _leave_process_group() -> None:
    """Without it, processes that end one after another may abort each other."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


COMMAND = Command(
    description="Learn a soft prompt that replaces a context.",
    options=(TrainOptions, SoftPromptConfig, SoftPromptTrainingArguments),
    run=train,
)
