"""The command ``train``: have the teacher answer the queries, train a soft prompt, save it."""

from __future__ import annotations

from ...student.soft_prompt import SoftPromptConfig
from ...training.arguments import SoftPromptTrainingArguments, TrainOptions
from ...training.lr_finder import find_lr
from ...training.preflight import check_arguments, check_data
from ...training.run import checkpoint_to_go_on_from, train_prompt
from ...training.setup import owned_directory, prepare, read_data
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
    args.disable_tqdm = args.disable_tqdm or args.process_index != 0
    if options.find_lr:
        student, lessons = prepare(options, config, args, data)
        find_lr(student, args, lessons.train_set, lessons.asked)
        return 0
    with owned_directory(options, args, data, invocation.changed) as directory:
        if directory.is_finished:
            say(f"{directory.path} holds the soft prompt of this run: nothing is left to train.")
            say("Pass --overwrite_output_dir to train anew.")
            return 0
        checkpoint = checkpoint_to_go_on_from(args, directory)
        student, lessons = prepare(options, config, args, data, checkpoint)
        return train_prompt(
            student,
            lessons,
            args,
            directory,
            invocation.stop,
            anew=options.overwrite_output_dir,
            checkpoint=checkpoint,
        )


COMMAND = Command(
    description="Learn a soft prompt that replaces a context.",
    options=(TrainOptions, SoftPromptConfig, SoftPromptTrainingArguments),
    run=train,
)
