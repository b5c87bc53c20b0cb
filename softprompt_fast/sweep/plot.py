"""The picture of a sweep: how far the model is from the full context, by the prompt's length."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from ..evaluation.baselines import CUT, NONE, PRUNED, RETRIEVED, SOFT
from ..evaluation.report.plots import COLOURS, blank, png

INCHES = (7.2, 3.8)
OBJECTIVE_COLOURS = {"nll": "#b3402e", "kl": COLOURS[SOFT], "mix": "#2e8b62"}
MORE_COLOURS = ("#7a3b8f", "#5b6770", "#a8326e")
MARKERS = "osD^vP"
# Powers of two by which the lines stand apart, so that error bars do not hide each other.
SHIFT = 0.05
# Of the axis, between two labelled lengths.
LEAST_GAP = 0.06


def curve_picture(curve: dict[str, Any]) -> bytes:
    """A PNG file.    curve: ``sweep.compression_curve`` with at least one row"""
    figure, axes = blank(INCHES)
    _draw_objectives(axes, curve["rows"])
    _draw_baselines(axes, curve["baselines"])
    lengths = sorted({row["num_virtual_tokens"] for row in curve["rows"]})
    shown = _apart(lengths)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{P:,}" for P in shown])
    axes.set_xlim(lengths[0] / 2**0.3, lengths[-1] * 2**0.3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the context's place")
    axes.set_ylabel("KL to the full context, nats/token")
    axes.set_title(
        f"{curve['context_tokens']:,} tokens of context, {curve['queries']:,} held-out queries; "
        "bars: ± standard error",
        fontsize=9,
        loc="left",
    )
    # Otherwise matplotlib puts lines with error bars last.
    lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = sorted(lines, key=lambda name: not name.startswith(SOFT))
    handles = [lines[name] for name in names]
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)
    return png(figure)


def _draw_baselines(axes: Axes, baselines: dict[str, Any]) -> None:
    style: Any = {"ls": "--", "lw": 1.4, "zorder": 1}
    for name in (NONE, RETRIEVED):
        if name in baselines:
            axes.axhline(baselines[name]["kl"], color=COLOURS[name], label=name, **style)
    for name in (CUT, PRUNED):
        rows = baselines[name]
        axes.plot(
            [row["num_virtual_tokens"] for row in rows],
            [row["kl"] for row in rows],
            ".-",
            color=COLOURS[name],
            lw=1.1,
            label=name,
            zorder=1,
        )


def _draw_objectives(axes: Axes, rows: list[dict[str, Any]]) -> None:
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    more, markers = cycle(MORE_COLOURS), cycle(MARKERS)
    for place, objective in enumerate(objectives):
        shift = 2 ** (SHIFT * (place - (len(objectives) - 1) / 2))
        points = [row for row in rows if row["objective"] == objective]
        axes.errorbar(
            [row["num_virtual_tokens"] * shift for row in points],
            [row["kl"] for row in points],
            # One answer alone has no standard error.
            yerr=[row["kl_standard_error"] or 0.0 for row in points],
            color=OBJECTIVE_COLOURS.get(objective) or next(more),
            marker=next(markers),
            ms=4.5,
            lw=2,
            elinewidth=1,
            capsize=2.5,
            label=f"soft prompt, {objective}",
        )


def _apart(lengths: list[int]) -> list[int]:
    """Those whose labels do not run into each other."""
    gap = LEAST_GAP * math.log2(lengths[-1] / lengths[0])
    shown = lengths[:1]
    for P in lengths[1:]:
        if math.log2(P / shown[-1]) >= gap:
            shown.append(P)
    return shown
