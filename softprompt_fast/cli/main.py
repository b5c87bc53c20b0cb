"""``softprompt-fast COMMAND``: one command in, one exit code out.

0 done · 1 could not be done, with one message · 2 wrong usage · 130, 143 stopped by a signal
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import Any

from ..utils.console import closest, complain
from ..utils.errors import OptionError, is_out_of_memory

COMMANDS = {
    "synthesize": "have the model write queries about a context, and answer them",
    "train": "learn a soft prompt that replaces a context",
    "sweep": "learn one for each of several lengths and objectives, and draw how faithful they are",
    "eval": "compare it with the context, on held-out queries",
    "doctor": "explain a run that did not learn: softprompt-fast doctor DIR",
    "generate": 'answer a question with it: softprompt-fast generate --prompt_dir DIR "QUESTION"',
    "chat": "answer questions with it, line by line, and remember the conversation",
    "export": "hand it on to PEFT, to vLLM, or as plain safetensors",
}
SUMMARIES = "".join(f"  {name:<12}{summary}\n" for name, summary in COMMANDS.items())
USAGE = f"""usage: softprompt-fast COMMAND [--flags] [--config FILE.yaml]

{SUMMARIES}
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


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. Errors that a user can mend become one message on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows ASCII only gets the rest spelled out, and no UnicodeEncodeError.
        sys.stdout.reconfigure(errors="backslashreplace")
    given: dict[str, Any] = {}
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0 if arguments else 2
        if arguments[0] not in COMMANDS:
            hint = closest(arguments[0], COMMANDS)
            raise OptionError(f"unknown command {arguments[0]!r}{hint}")
        # Not above: this takes seconds, and Ctrl-C is to end them like all others.
        from .parser import run_command

        return run_command(arguments[0], arguments[1:], given)
    except KeyboardInterrupt:
        return 130
    except OptionError as error:
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


def _memory_advice(given: Mapping[str, Any]) -> str:
    levers = [f"--{name} (now {given[name]})" for name in MEMORY_OPTIONS if given.get(name)]
    advice = f"Lower {' or '.join(levers)}." if levers else "Use a smaller model."
    if "gradient_accumulation_steps" in given:
        advice += " --gradient_accumulation_steps makes up for a smaller batch."
    return advice


if __name__ == "__main__":
    sys.exit(main())
