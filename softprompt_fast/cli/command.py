"""What a command of ``softprompt-fast`` declares; each is one file in ``commands/``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..training.callbacks import StopOnSignal


@dataclass(frozen=True, kw_only=True)
class Argument:
    """The one argument of a command that is no flag."""

    name: str
    help: str
    required: bool = False


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """What a command is told besides its options."""

    changed: dict[str, Any]
    """The options that the user gave, by name, where they are not the defaults."""

    argument: str | None
    """The one that is no flag."""

    stop: StopOnSignal


@dataclass(frozen=True, kw_only=True)
class Command:
    description: str
    options: tuple[Any, ...]
    """Dataclasses, whose fields are the flags."""

    run: Callable[..., int]
    """From one object of each of ``options`` and an ``Invocation`` to the exit code."""

    argument: Argument | None = None

    several: tuple[str, ...] = ()
    """Flags that take several values each."""

    split: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None
    """With ``several``: from the values of all flags, lists of them for these, to the values of one
    run after another. Then ``run`` gets a list: of what it would get of each run alone."""
