"""The curve of a sweep as a table on the screen."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..evaluation.baselines import CUT, NONE, PRUNED, RETRIEVED
from ..evaluation.report.tables import kl_with_error


def curve_table(curve: dict[str, Any]) -> Table:
    """``sweep.compression_curve`` for ``rich`` to print."""
    baselines = curve["baselines"]
    alone = [
        f"{name}: {kl_with_error(baselines[name])}"
        for name in (NONE, RETRIEVED)
        if name in baselines
    ]
    title = (
        f"KL to the full context ({curve['context_tokens']} tokens), nats/token, and KL recovered; "
        + ", ".join(alone)
    )
    result = Table(title=title, title_justify="left")
    headings, rows = curve_cells(curve)
    for heading in headings:
        result.add_column(heading, justify="right")
    for cells in rows:
        result.add_row(*cells)
    return result


def curve_cells(curve: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows, one for each P: the soft prompts, then as many plain tokens."""
    points = {(row["objective"], row["num_virtual_tokens"]): row for row in curve["rows"]}
    for name in (CUT, PRUNED):
        rows = curve["baselines"][name]
        points |= {(name, row["num_virtual_tokens"]): row for row in rows}
    names = list(dict.fromkeys(name for name, _ in points))
    lengths = sorted({P for _, P in points})
    return ["P", *names], [[str(P), *(_point(points[name, P]) for name in names)] for P in lengths]


def _point(row: dict[str, Any]) -> str:
    recovered = row["kl_recovered"]
    return f"{row['kl']:.3f}" + ("" if recovered is None else f", {recovered:.0%}")
