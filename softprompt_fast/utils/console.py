"""What a person reads: results on stdout, progress and problems on stderr."""

from __future__ import annotations

import difflib
import os
import sys
import unicodedata
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from .text import shortened

# Characters that turn the direction of a line around, so that it reads as something else.
BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

MESSAGE_CHARACTERS = 4000


def printable(text: str) -> str:
    """``text`` with control characters spelled out, so that data cannot drive the terminal."""
    return "".join(_spell(character) for character in text)


def one_line(text: str) -> str:
    return " ".join(printable(text).split())


def closest(word: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?``, or nothing where no name is close to ``word``."""
    bare = {name.lstrip("-"): name for name in known}
    close = difflib.get_close_matches(word.strip("-_"), bare, n=1)
    return f"; did you mean {bare[close[0]]}?" if close else ""


def say(text: str = "") -> None:
    if _speaks_for_all():
        _print(Console(), text)


def show(text: str) -> None:
    """A piece of a line, at once; rich would make spaces of a tab, by where the piece begins."""
    if _speaks_for_all():
        sys.stdout.write(printable(text))
        sys.stdout.flush()


def progress(text: str) -> None:
    if _speaks_for_all():
        _print(Console(stderr=True), text)


def complain(text: str) -> None:
    # A message quotes what was wrong, which may be a line of a file without an end.
    _print(Console(stderr=True), f"error: {shortened(text, MESSAGE_CHARACTERS)}")


def launched_processes() -> int:
    """How many processes torchrun or accelerate started; 1 without them."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() else 1


def _speaks_for_all() -> bool:
    """Of several processes, the first one does. A RANK alone was left over from something else."""
    return launched_processes() == 1 or os.environ.get("RANK", "0") == "0"


def _print(console: Console, text: str) -> None:
    # Text, so that "[red]" in the data stays what it is; rich would read it as markup.
    console.print(Text(printable(text)), soft_wrap=True)


def _spell(character: str) -> str:
    is_control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return ascii(character)[1:-1] if is_control or character in BIDI else character
