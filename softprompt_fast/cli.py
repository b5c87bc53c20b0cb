"""``softprompt-fast train | eval | generate``: flags and config files in, one exit code out.

0 done · 1 could not be done, with one message · 2 wrong usage · 130, 143 stopped by a signal
"""

from __future__ import annotations

import difflib
import itertools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser
from transformers.utils import logging as transformers_logging

from .commands import (
    EvalOptions,
    PromptOptions,
    answer_question,
    evaluate_prompt,
)
from .config_file import UsageError, config_arguments
from .console import complain
from .signals import StopOnSignal
from .soft_prompt import SoftPromptConfig
from .train import TrainOptions, train
from .trainer import SoftPromptTrainingArguments

USAGE = """usage: softprompt-fast COMMAND [--flags] [--config FILE.yaml]

  train     learn a soft prompt that replaces a context
  eval      compare it with the context, on held-out queries
  generate  answer a question with it: softprompt-fast generate --prompt_dir DIR "QUESTION"

softprompt-fast COMMAND --help lists the flags. A config file holds the same names as the flags,
one "name: value" a line; flags win over it, and its relative paths start at its own directory.
"""

# What takes memory, largest lever first.
MEMORY_OPTIONS = (
    "per_device_train_batch_size",
    "teacher_batch_size",
    "batch_size",
    "max_new_tokens",
    "workspace_mib",
)


class Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. Errors that a user can mend become one message on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    transformers_logging.set_verbosity_error()
    stop = StopOnSignal()
    given: dict[str, Any] = {}
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0 if arguments else 2
        command = COMMANDS.get(arguments[0])
        if command is None:
            raise UsageError(f"unknown command {arguments[0]!r}{_hint(arguments[0], COMMANDS)}")
        stop.install()
        return command(arguments[1:], given, stop)
    except UsageError as error:
        complain(str(error))
        return 2
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        complain(f"{error.filename}: {error.strerror}" if named else str(error))
        return 1
    except (ValueError, FloatingPointError) as error:
        complain(str(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        complain(f"out of memory. {_memory_advice(given)}")
        return 1
    finally:
        stop.uninstall()


def run_train(arguments: list[str], given: dict[str, Any], stop: StopOnSignal) -> int:
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


def run_eval(arguments: list[str], given: dict[str, Any], stop: StopOnSignal) -> int:
    parser = _parser("eval", (EvalOptions,), "Compare a soft prompt with the context it replaces.")
    (options,) = _build(parser, _parse(parser, arguments, given)[0])
    return evaluate_prompt(options)


def run_generate(arguments: list[str], given: dict[str, Any], stop: StopOnSignal) -> int:
    parser = _parser("generate", (PromptOptions,), "Answer a question with a soft prompt.")
    parser.add_argument("question", nargs="?", help="without it, the question is read from stdin")
    values, _ = _parse(parser, arguments, given)
    question = values.pop("question")
    (options,) = _build(parser, values)
    return answer_question(options, question)


COMMANDS: dict[str, Callable[[list[str], dict[str, Any], StopOnSignal], int]] = {
    "train": run_train,
    "eval": run_eval,
    "generate": run_generate,
}


def is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(
        error
    )


def _memory_advice(given: dict[str, Any]) -> str:
    levers = [f"--{name} (now {given[name]})" for name in MEMORY_OPTIONS if given.get(name)]
    advice = f"Lower {' or '.join(levers)}." if levers else "Use a smaller model."
    if "gradient_accumulation_steps" in given:
        advice += " --gradient_accumulation_steps makes up for a smaller batch."
    return advice


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
    """Values by name, and the names that the user typed; ``given`` gets the values for messages."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(arguments)[0].config
    if config is not None:
        names = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
        arguments = config_arguments(config, names) + arguments
    typed = set()
    # Before argparse, which would first complain of what the misspelt flag leaves missing.
    for argument in itertools.takewhile("--".__ne__, arguments):
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in parser._option_string_actions:
            known = [name for name in parser._option_string_actions if "-" not in name[2:]]
            raise UsageError(f"unknown flag {flag!r}{_hint(flag.replace('-', '_'), known)}")
        if flag.startswith("--"):
            typed.add(parser._option_string_actions[flag].dest)
    values = vars(parser.parse_args(arguments))
    values.pop("config")
    given.update(values)
    return values, typed - {"config"}


def _build(parser: Parser, values: dict[str, Any]) -> tuple[Any, ...]:
    try:
        return parser.parse_dict(values)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _hint(word: str, known) -> str:
    bare = {name.lstrip("-"): name for name in known}
    close = difflib.get_close_matches(word.strip("-_"), bare, n=1)
    return f"; did you mean {bare[close[0]]}?" if close else ""


if __name__ == "__main__":
    sys.exit(main())
