"""What ``make test`` leaves out of a law's matrix."""

from __future__ import annotations

from itertools import combinations, product

from marking import sample

MATRIX = {"engine": "cts", "dtype": "fbh", "loss": "nkd", "vocabulary": [1, 131, 515, 4099]}


def pairs(rows):
    return {pair for row in rows for pair in combinations(sorted(row.items()), 2)}


def test_a_sample_holds_every_pair_of_values():
    rows = [dict(zip(MATRIX, values, strict=True)) for values in product(*MATRIX.values())]
    pairwise = [rows[index] for index in sample(rows)]
    assert pairs(pairwise) == pairs(rows)
    assert 3 * 4 <= len(pairwise) < 3 * 4 * 2
    short = [rows[index] for index in sample(rows, 1)]
    assert len(short) == 4
    assert sample(rows, 0) == [0]
    assert all({row[name] for row in short} == set(values) for name, values in MATRIX.items())


def test_a_sample_of_few_rows_is_all_of_them():
    assert sample([]) == []
    assert sample([{"engine": "c"}, {"engine": "t"}]) == [0, 1]
    rows = [{"engine": e, "dtype": d} for e, d in product("ct", "fb")]
    assert sorted(sample(rows)) == [0, 1, 2, 3]
