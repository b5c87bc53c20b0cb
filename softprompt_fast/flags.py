"""From flags and config files to the options of a command."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from .arguments import SoftPromptTrainingArguments
from .commands import EvalOptions, PromptOptions, answer_question, evaluate_prompt
from .config_file import PATH_OPTIONS, config_arguments
from .console import closest
from .errors import UsageError
from .signals import StopOnSignal
from .soft_prompt import SoftPromptConfig
from .train import TrainOptions, train

TEXT_OPTIONS = ("question", "prompt_tuning_init_text")


def run_command(name: str, arguments: list[str], given: dict[str, Any]) -> int:
    """The exit code. ``given`` gets the values of all options, for messages.

    Raises UsageError where the arguments are wrong.
    """
    transformers_logging.set_verbosity_error()
    # The older name of an argument: the one that every version we support takes.
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    stop = StopOnSignal()
    stop.install()
    try:
        if name == "train":
            return _train(arguments, given, stop)
        return _eval(arguments, given) if name == "eval" else _generate(arguments, given)
    finally:
        stop.uninstall()


def _train(arguments: list[str], given: dict[str, Any], stop: StopOnSignal) -> int:
    types = (TrainOptions, SoftPromptConfig, SoftPromptTrainingArguments)
    parser = _parser("train", types, "Learn a soft prompt that replaces a context.")
    values, typed = _parse(parser, arguments, given)
    if not values["output_dir"]:
        raise UsageError("the following arguments are required: --output_dir")
    # Left open, it would follow the verbosity, which is low here for the sake of a clean screen.
    values["disable_tqdm"] = bool(values["disable_tqdm"])
    options, config, args = _build(parser, values)
    changed = {n: values[n] for n in sorted(typed) if values[n] != parser.get_default(n)}
    return train(options, config, args, given=changed, stop=stop)


def _eval(arguments: list[str], given: dict[str, Any]) -> int:
    parser = _parser("eval", (EvalOptions,), "Compare a soft prompt with the context it replaces.")
    (options,) = _build(parser, _parse(parser, arguments, given)[0])
    return evaluate_prompt(options)


def _generate(arguments: list[str], given: dict[str, Any]) -> int:
    parser = _parser("generate", (PromptOptions,), "Answer a question with a soft prompt.")
    parser.usage = f'{parser.usage} ["QUESTION"]'
    parser.add_argument("question", nargs="?", help="without it, the question is read from stdin")
    values, _ = _parse(parser, arguments, given)
    question = values.pop("question")
    (options,) = _build(parser, values)
    return answer_question(options, question)


class Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help")


def _parser(command: str, types: tuple[Any, ...], description: str) -> Parser:
    parser = Parser(
        types,
        prog=f"softprompt-fast {command}",
        usage=f"softprompt-fast {command} [--config FILE.yaml] [--flags]",
        description=description,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of these flags; flags given besides it win")
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
        flags = {action.dest for action in parser._actions if action.option_strings}
        names = sorted(flags - {"help", "config"})
        arguments = config_arguments(config, names) + arguments
    typed = set()
    # Before argparse, which would first complain of what the misspelt flag leaves missing.
    for argument in itertools.takewhile("--".__ne__, arguments):
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in parser._option_string_actions:
            known = [name for name in parser._option_string_actions if "-" not in name[2:]]
            raise UsageError(f"unknown flag {flag!r}{closest(flag.replace('-', '_'), known)}")
        if flag.startswith("--"):
            typed.add(parser._option_string_actions[flag].dest)
    values = vars(parser.parse_args(arguments))
    values.pop("config")
    given.update(values)
    for name in ("model", *PATH_OPTIONS):
        _check_not_empty(name, values.get(name))
    for name in TEXT_OPTIONS:
        _check_utf8(name, values.get(name))
    return values, typed - {"config"}


def _check_not_empty(name: str, value: str | None) -> None:
    if value == "":
        raise UsageError(f"--{name} is empty: give a path, or leave it out")


def _check_utf8(name: str, value: str | None) -> None:
    """Python hands on the bytes of an argument that are not UTF-8 as halves of surrogate pairs."""
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} is not UTF-8: see character {error.start}") from None


def _build(parser: Parser, values: dict[str, Any]) -> tuple[Any, ...]:
    try:
        return parser.parse_dict(values)
    except (ValueError, RuntimeError, ImportError) as error:  # as each check sees fit
        raise UsageError(str(error)) from error
