"""``softprompt-fast COMMAND``: one command in, one exit code out.

0 done · 1 could not be done, with one message · 2 wrong usage · 130, 143 stopped by a signal
"""

from __future__ import annotations

# Nothing else is imported here: until ``main`` has the signals, Ctrl-C shows a traceback.
import os
import signal
import sys
from types import TracebackType

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

ISSUES = "https://github.com/softprompt-fast/softprompt_fast/issues"

# What takes memory, largest lever first.
MEMORY_OPTIONS = (
    "per_device_train_batch_size",
    "teacher_batch_size",
    "batch_size",
    "max_new_tokens",
    "workspace_mib",
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code. Errors that a user can mend become one message on stderr.

    Without ``arguments`` it runs those of the process, and takes over the signals of the process.
    """
    if arguments is None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _leave)
        arguments = sys.argv[1:]
        sys.excepthook = _report

    import io

    if sys.stderr is None:  # closed by the shell: 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stdout is None:
        _complain("standard output is closed, so that results would be lost; try > /dev/null")
        return 1

    from ..utils.errors import OptionError, is_out_of_memory

    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows ASCII only gets the rest spelled out, and no UnicodeEncodeError.
        sys.stdout.reconfigure(errors="backslashreplace")
    given: dict[str, object] = {}
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0 if arguments else 2
        if arguments[0] not in COMMANDS:
            from ..utils.console import closest

            hint = closest(arguments[0], COMMANDS)
            raise OptionError(f"unknown command {arguments[0]!r}{hint}")
        from .parser import run_command  # takes seconds

        return run_command(arguments[0], arguments[1:], given)
    except KeyboardInterrupt:
        return 130
    except OptionError as error:
        _complain(str(error))
        return 2
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        _complain(f"{error.filename}: {error.strerror}" if named else str(error))
        return 1
    except (ValueError, FloatingPointError) as error:
        _complain(str(error))
        return 1
    except ImportError as error:
        _complain(f"a package is missing or too old: {error}")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _complain(f"out of memory. {_memory_advice(given)}")
        return 1


def _leave(number: int, frame: object) -> None:
    """At once, without an exception, which imports and weak references may swallow or print.

    Before a command runs and after it there is nothing to save; while it runs, ``StopOnSignal``
    has the signals.
    """
    os._exit(128 + number)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What no message was written for: a mistake of ours, or of a package under us."""
    sys.__excepthook__(kind, error, trace)
    if issubclass(kind, Exception):
        _complain(f"this should not have happened. Please report the lines above: {ISSUES}")


def _complain(text: str) -> None:
    from ..utils.console import complain

    complain(text)


def _memory_advice(given: dict[str, object]) -> str:
    levers = [f"--{name} (now {given[name]})" for name in MEMORY_OPTIONS if given.get(name)]
    advice = f"Lower {' or '.join(levers)}." if levers else "Use a smaller model."
    if "gradient_accumulation_steps" in given:
        advice += " --gradient_accumulation_steps makes up for a smaller batch."
    return advice


if __name__ == "__main__":
    sys.exit(main())
