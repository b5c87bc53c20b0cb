"""The command ``chat``: questions line by line, answers with all that was said before."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ...data.queries import Query, tokenize_query
from ...data.records import MAX_LINE_BYTES
from ...student.model import SoftPromptModel
from ...training.run_directory import read_run
from ...utils.console import complain, progress, say
from ..command import Command, Invocation
from ..saved_prompt import PromptOptions, load_prompt, recorded_inputs, tell_answer

QUIT, RESET = "/quit", "/reset"


@dataclass(kw_only=True)
class Conversation:
    """What was said so far, and the model that answers."""

    model: SoftPromptModel
    tokenizer: Any
    max_new_tokens: int
    messages: list[dict[str, str]] = field(default_factory=list)
    """Those of the user and of the assistant by turns."""

    def ask(self, question: str) -> None:
        """Shows the answer. Raises ValueError if the question alone does not fit into the model."""
        asked, query = self._that_fits([*self.messages, {"role": "user", "content": question}])
        forgotten = (len(self.messages) + 1 - len(asked)) // 2
        if forgotten:
            turns = "turn no longer fits" if forgotten == 1 else "turns no longer fit"
            progress(f"The oldest {forgotten} {turns} into the model's positions: forgotten")
        answer = tell_answer(self.model, self.tokenizer, query, self.max_new_tokens)
        self.messages = [*asked, {"role": "assistant", "content": answer}]

    def _that_fits(self, messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], Query]:
        """The messages without the oldest turns, as few as can be, and the query they make."""
        while True:
            query = tokenize_query(self.tokenizer, messages, "", source="the question")
            try:
                self.model.check_length(query, self.max_new_tokens)
            except ValueError:
                if len(messages) == 1:
                    raise
                messages = messages[2:]
            else:
                return messages, query


def hold_conversation(options: PromptOptions, invocation: Invocation) -> int:
    """Answers each line of stdin, until it ends. The exit code is 1 if a line had no answer."""
    inputs = recorded_inputs(options, read_run(options.prompt_dir))
    model, tokenizer, prompt = load_prompt(options, inputs)
    conversation = Conversation(
        model=SoftPromptModel(model, prompt),
        tokenizer=tokenizer,
        max_new_tokens=inputs["max_new_tokens"],
    )
    exit_code = 0
    for line in _lines():
        if line == QUIT:
            break
        if line == RESET:
            conversation.messages = []
            progress("Forgotten: the next question is the first one")
            continue
        try:
            conversation.ask(line)
        except ValueError as error:  # the next line may well have an answer
            complain(str(error))
            exit_code = 1
    return exit_code


def _lines() -> Iterator[str]:
    """The lines of stdin that are not blank. Raises ValueError where one is not UTF-8."""
    lines = _typed() if sys.stdin.isatty() else _piped()
    for line in lines:
        if line.strip():
            yield line.strip()


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # from now on, input() can edit a line and recall earlier ones
    progress(f"{QUIT} or Ctrl-D ends the conversation, {RESET} forgets it")
    sign = "> " if sys.stdout.isatty() else ""
    while True:
        try:
            line = input(sign)
            line.encode()
        except EOFError:
            say()
            return
        except SystemExit:
            say()  # of a signal: the sign stands on the line
            raise
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            complain(f"the line is not UTF-8: see character {error.start}")
            continue
        yield line


def _piped() -> Iterator[str]:
    # Not as text: it is decoded in blocks, and a bad byte would cost the lines before it.
    read = sys.stdin.buffer.readline
    for number, raw in enumerate(iter(lambda: read(MAX_LINE_BYTES + 1), b""), 1):
        if len(raw) > MAX_LINE_BYTES:
            raise ValueError(f"stdin:{number}: the line is longer than {MAX_LINE_BYTES} bytes")
        try:
            yield raw.decode().removeprefix("\ufeff" if number == 1 else "")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"stdin:{number}: not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
            ) from None


COMMAND = Command(
    description="Answer questions with a soft prompt, line by line, each with those before it.",
    options=(PromptOptions,),
    run=hold_conversation,
)
