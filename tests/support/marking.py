"""Which tests are slow, emulated or need the real model, where their parameters or fixtures say it.

A law is a function, and its parameters are a matrix. On ``torch`` all of it is quick, next to the
reference; of the other engines a sample is, in which every value of a parameter still meets every
engine and every value of each other parameter. The rest is ``slow``: it runs in ``make test-all``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

import pytest

import softprompt_fast as spf


def mark_by_use(items: Sequence[pytest.Item]) -> None:
    emulated = {"emulated"} | ({"triton", "streaming"} if spf.backends.interpreted() else set())
    for item in items:
        if "real_model" in item.fixturenames:
            item.add_marker("real_model")
        if engine_of(item) in emulated:
            item.add_marker("emulated")


def mark_outside_of_the_sample(items: Sequence[pytest.Item]) -> None:
    matrices = defaultdict(list)
    for item in items:
        if engine_of(item) not in (None, "torch") and parameters(item) and not is_skipped(item):
            matrices[item.nodeid.partition("[")[0]].append(item)
    for matrix in matrices.values():
        sample = pairwise([parameters(item) for item in matrix])
        for index in set(range(len(matrix))) - set(sample):
            matrix[index].add_marker("slow")


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


def is_skipped(item: pytest.Item) -> bool:
    return any(mark.args and mark.args[0] for mark in item.iter_markers("skipif"))


def pairwise(rows: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Indices of rows that hold every pair of values which any row holds, chosen greedily."""
    missing = [set(combinations(sorted(row.items()), min(2, len(row)))) for row in rows]
    chosen = []
    while any(missing):
        best = max(range(len(rows)), key=lambda index: len(missing[index]))
        chosen.append(best)
        missing = [pairs - missing[best] for pairs in missing]
    return chosen
