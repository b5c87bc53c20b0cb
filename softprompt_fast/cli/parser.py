"""From flags and config files to the options of a command."""

from __future__ import annotations

import itertools
import os
import warnings
from importlib import import_module
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from ..training.arguments import SoftPromptTrainingArguments
from ..training.callbacks import StopOnSignal
from ..utils.console import closest, launched_processes
from ..utils.errors import OptionError
from .command import Command, Invocation
from .config_file import PATH_OPTIONS, config_arguments

TEXT_OPTIONS = ("question", "prompt_tuning_init_text")


def run_command(name: str, arguments: list[str], given: dict[str, Any]) -> int:
    """The exit code. ``given`` gets the values of all options, for messages.

    Raises OptionError where the arguments are wrong.
    """
    transformers_logging.set_verbosity_error()
    # The older name of an argument: the one that every version we support takes.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    stop = StopOnSignal()
    command = import_module(f".commands.{name}", __package__).COMMAND
    parser = _parser(name, command)
    values, typed = _parse(parser, arguments, given)
    argument = values.pop(command.argument.name) if command.argument else None
    if SoftPromptTrainingArguments in command.options:
        _finish_training_arguments(values)
    elif (processes := launched_processes()) > 1:
        raise OptionError(
            f"{name} runs in one process, and WORLD_SIZE={processes} says that this is one of "
            f"{processes}: start it without a launcher, or unset RANK and WORLD_SIZE"
        )
    for several in command.several:
        if not isinstance(values[several], list):  # the default
            values[several] = [values[several]]
    runs = []
    for one in command.split(values) if command.split else [values]:
        changed = {n: one[n] for n in sorted(typed) if one[n] != parser.get_default(n)}
        invocation = Invocation(changed=changed, argument=argument, stop=stop)
        runs.append((*_build(parser, one), invocation))
    stop.install()
    try:
        return command.run(runs) if command.split else command.run(*runs[0])
    finally:
        stop.uninstall()


def _finish_training_arguments(values: dict[str, Any]) -> None:
    if not values["output_dir"]:
        raise OptionError("the following arguments are required: --output_dir")
    # transformers looks at LOCAL_RANK alone, and then misses the others.
    missing = [n for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if n not in os.environ]
    if missing and ("LOCAL_RANK" in os.environ or launched_processes() > 1):
        raise OptionError(
            f"the environment has some of RANK, WORLD_SIZE and LOCAL_RANK, but no {missing[0]}: "
            "unset them if something else left them over, or start the processes with torchrun"
        )
    # Left open, it would follow the verbosity, which is low here for the sake of a clean screen.
    values["disable_tqdm"] = bool(values["disable_tqdm"])


class Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}. See {self.prog} --help")


def _parser(name: str, command: Command) -> Parser:
    parser = Parser(
        command.options,
        prog=f"softprompt-fast {name}",
        usage=f"softprompt-fast {name} [--config FILE.yaml] [--flags]",
        description=command.description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of these flags; flags given besides it win")
    for name in command.several:
        parser._option_string_actions[f"--{name}"].nargs = "+"
    argument = command.argument
    if argument is not None:
        shown = argument.name.upper() if argument.required else f'["{argument.name.upper()}"]'
        parser.usage = f"{parser.usage} {shown}"
        nargs = None if argument.required else "?"
        parser.add_argument(argument.name, nargs=nargs, help=argument.help)
    return parser


def _parse(
    parser: Parser, arguments: list[str], given: dict[str, Any]
) -> tuple[dict[str, Any], set[str]]:
    """Values by name, and the names that the user typed."""
    first = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(arguments)[0].config
    if config is not None:
        _check_not_empty("config", config)
        config = os.path.expanduser(config)
        flags = {action.dest for action in parser._actions if action.option_strings}
        names = sorted(flags - {"help", "config"})
        arguments = config_arguments(config, names) + arguments
    typed = set()
    # Before argparse, which would first complain of what the misspelt flag leaves missing.
    for argument in itertools.takewhile("--".__ne__, arguments):
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in parser._option_string_actions:
            known = [name for name in parser._option_string_actions if "-" not in name[2:]]
            raise OptionError(f"unknown flag {flag!r}{closest(flag.replace('-', '_'), known)}")
        if flag.startswith("--"):
            typed.add(parser._option_string_actions[flag].dest)
    values = vars(parser.parse_args(arguments))
    values.pop("config")
    given.update(values)
    for name in ("model", *PATH_OPTIONS):
        _check_not_empty(name, values.get(name))
        if values.get(name) is not None:
            values[name] = os.path.expanduser(values[name])  # a shell leaves --name=~ as it is
    for name in TEXT_OPTIONS:
        _check_utf8(name, values.get(name))
    return values, typed - {"config"}


def _check_not_empty(name: str, value: str | None) -> None:
    if value == "":
        raise OptionError(f"--{name} is empty: give a path, or leave it out")


def _check_utf8(name: str, value: str | None) -> None:
    """Python hands on the bytes of an argument that are not UTF-8 as halves of surrogate pairs."""
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise OptionError(f"{name} is not UTF-8: see character {error.start}") from None


def _build(parser: Parser, values: dict[str, Any]) -> tuple[Any, ...]:
    try:
        return parser.parse_dict(values)
    except (ValueError, RuntimeError, ImportError) as error:  # as each check sees fit
        raise OptionError(str(error)) from error
