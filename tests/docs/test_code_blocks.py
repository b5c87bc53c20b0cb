"""Every code block of README.md, CONTRIBUTING.md and docs/ does what a reader expects of it.

Python runs, all blocks of a page one after another in one namespace. Shell commands are parsed by
the real command line, and name files, targets and packages that exist. JSON and YAML parse. Blocks
without a language are for people: output, trees of files, drawings.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
from collections import defaultdict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from toy_run import RUN_FLAGS, train_flags

from softprompt_fast.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = "models/smollm2-135m-instruct"


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        yield Block(str(page.relative_to(ROOT)), line, match[1], match[2])
