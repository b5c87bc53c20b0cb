"""Which tests are slow, emulated or need the real model, where their parameters or fixtures say it.

A law is a function, and its parameters are a matrix. On ``torch`` all of it is quick, next to the
reference; of the other engines a sample is, in which every value of a parameter still meets every
engine and every value of each other parameter. Triton's interpreter takes seconds for a problem:
there the sample has each value once, and one row for a law that is marked ``long_interpreted``. The
rest is ``slow``: it runs in ``make test-all``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

import pytest

import softprompt_fast as spf


def mark_by_use(items: Sequence[pytest.Item]) -> None:
    for item in items:
        if "real_model" in item.fixturenames:
            item.add_marker("real_model")
            item.add_marker("slow")
        if is_interpreted(item) or engine_of(item) == "emulated":
            item.add_marker("emulated")


def mark_outside_of_the_sample(items: Sequence[pytest.Item]) -> None:
    matrices = defaultdict(list)
    for item in items:
        if engine_of(item) in (None, "torch") or is_left_out(item):
            continue
        matrices[item.nodeid.partition("[")[0], is_interpreted(item)].append(item)
    for (_, interpreted), matrix in matrices.items():
        rows = [parameters(item) for item in matrix]
        long = interpreted and matrix[0].get_closest_marker("long_interpreted")
        for index in set(range(len(rows))) - set(sample(rows, 0 if long else 2 - interpreted)):
            matrix[index].add_marker("slow")


def is_interpreted(item: pytest.Item) -> bool:
    return spf.backends.interpreted() and engine_of(item) in ("triton", "streaming")


def engine_of(item: pytest.Item) -> str | None:
    """The backend that a test is about, or whose kernels it runs."""
    given = parameters(item)
    for name in ("backend", "kernels"):
        if name in given:
            return given[name]
    return "emulated" if "emulated" in item.fixturenames else None


def parameters(item: pytest.Item) -> dict[str, str]:
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None else {name: str(v) for name, v in callspec.params.items()}


def is_left_out(item: pytest.Item) -> bool:
    """By a mark of its own, or since it has no parameters to choose from."""
    is_skipped = any(mark.args and mark.args[0] for mark in item.iter_markers("skipif"))
    return is_skipped or bool(item.get_closest_marker("slow")) or not parameters(item)


def sample(rows: Sequence[Mapping[str, Hashable]], size: int = 2) -> list[int]:
    """Indices of rows that hold every ``size`` values which any row holds, chosen greedily.

    size: 2 for pairs; 1 for each value once; 0 for one row
    """
    missing = [set(combinations(sorted(row.items()), min(size, len(row)))) for row in rows]
    chosen = []
    while any(missing):
        best = max(range(len(rows)), key=lambda index: len(missing[index]))
        chosen.append(best)
        missing = [values - missing[best] for values in missing]
    return chosen
