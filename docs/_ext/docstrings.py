"""Docstrings as the sources have them, made into reStructuredText.

Three things are added: a list of arguments from lines such as
``hidden [..., D]    weight [V, D], frozen``, links from ````names```` that are public, and the
fields of a dataclass whose metadata carries a help text.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

from sphinx.application import Sphinx

import softprompt_fast as spf

# "hidden [..., D]", "labels [...] says which", "record_hidden, sketch: what the answers hold".
NAME = r"[a-z_]\w*(?: \[[^\]]*\])?"
NAMES = rf"{NAME}(?:, {NAME})*"
ARGUMENT = re.compile(rf"^({NAMES})(:| over (?=\[)|(?<=\]))(.*)$", re.DOTALL)
NEXT_ARGUMENT = re.compile(rf" {{4,}}|(?<=[.;]) (?={NAMES}: )")
BARE_NAME = re.compile(r"(?<![\[.\w])([a-z_]\w*)(?![^\[]*\])")  # not within a shape
SHAPE = re.compile(r" (\[[^\]]*\])")
PUBLIC = re.compile(r"``(\w+)``")


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    written: list[str] = []
    for paragraph in _paragraphs(lines):
        items = _arguments(paragraph)
        written += [_link(line) for line in (paragraph if items is None else _as_list(items))]
        written.append("")
    if what == "class" and dataclasses.is_dataclass(obj):
        written += _fields_with_help(obj)
    lines[:] = written


def _paragraphs(lines: list[str]) -> list[list[str]]:
    groups = itertools.groupby(lines, key=lambda line: bool(line.strip()))
    return [list(group) for is_text, group in groups if is_text]


def _arguments(paragraph: list[str]) -> list[str] | None:
    """The items of a paragraph that names arguments, None of another one."""
    if not ARGUMENT.match(paragraph[0]):
        return None
    items: list[str] = []
    for line in paragraph:
        for part in NEXT_ARGUMENT.split(line):
            if ARGUMENT.match(part) or part.startswith("Raises "):
                items.append(part)
            else:
                items[-1] += f" {part}"
    return items


def _as_list(items: list[str]) -> list[str]:
    lines = []
    for item in items:
        match = ARGUMENT.match(item)
        if match is None:  # what is raised is a paragraph of its own
            lines += ["", item]
            continue
        names, separator, text = match.groups()
        names = BARE_NAME.sub(r"**\1**", names)
        shapes = SHAPE.sub(r" ``\1``", names)
        lines.append(f"- {shapes}{separator}{text}")
    return lines


def _fields_with_help(cls: type) -> list[str]:
    """A line for each of the fields that the class does not inherit."""
    return [
        f"- **{field.name}** (``{field.default!r}``): {field.metadata['help']}"
        for field in dataclasses.fields(cls)
        if field.name in cls.__annotations__ and "help" in field.metadata
    ]


def _link(text: str) -> str:
    def target(match: re.Match[str]) -> str:
        name = match[1]
        return f":py:obj:`~softprompt_fast.{name}`" if name in spf.__all__ else match[0]

    return PUBLIC.sub(target, text)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
