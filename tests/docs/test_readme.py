"""The README stays a front door: short, with a small table and examples of a few lines."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_the_two_commands_stand_near_the_top():
    start = README.splitlines()[:20]
    assert {"make demo", "make test"} <= {line.partition("  ")[0] for line in start}


def test_an_example_has_at_most_12_lines():
    examples = re.findall(r"^```(?:python|sh)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len(examples) == 4
    assert max(len(example.splitlines()) for example in examples) <= 12


def test_it_has_one_table_of_at_most_8_rows():
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert len(tables) == 1
    assert len(tables[0].splitlines()) - 2 <= 8
