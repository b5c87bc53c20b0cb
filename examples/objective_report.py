"""The report of choose_objective.py as a table and as a picture."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KL, NLL, TEACHER = "#c2410c", "#64748b", "#334155"
COLUMNS = ("goal", "measured", "full context", "KL", "NLL")
ROWS = (
    ("1. keep the distribution", "KL to the full context, nats per token", "kl", ".3f"),
    ("1. keep the distribution", "entropy, nats per token", "entropy", ".2f"),
    ("1. keep the distribution", "ranking of 20 wrong answers (Spearman)", "ranking", ".2f"),
    ("1. keep the distribution", "{wrong}'s place among all tokens", "place", ".0f"),
    ("2. one right answer", "{right}, the right answer", "right", ".2%"),
    ("2. one right answer", "{wrong}, the alternative", "wrong", ".2%"),
)


def rows(report: dict[str, Any]) -> list[list[str]]:
    """Cells under COLUMNS: both objectives on both goals."""
    return [
        [
            goal,
            what.format(**report),
            *(format(report[name][figure], form) for name in ("teacher", "kl", "nll")),
        ]
        for goal, what, figure, form in ROWS
    ]


def table(report: dict[str, Any]) -> Table:
    """For ``rich`` to print, 80 columns wide."""
    title = (
        f"{report['context_tokens']} tokens of context -> {report['num_virtual_tokens']} virtual "
        f"tokens, {report['steps']} steps\nheld-out query: {report['held_out_queries'][0]}"
    )
    result = Table(title=title, title_justify="left")
    for heading in COLUMNS[1:]:
        result.add_column(heading, justify="left" if heading == "measured" else "right")
    for goal, group in groupby(rows(report), key=itemgetter(0)):
        result.add_row(goal, style="bold")
        for _, *cells in group:
            result.add_row(*cells)
        result.add_section()
    return result


def path_line(report: dict[str, Any]) -> str:
    """The misconception in a sentence."""
    path = report["kl"]["path"]
    first, last = path[0], path[-1]
    return (
        f"While KL falls from {first['kl']:.3f} to {last['kl']:.3f} nats, the virtual tokens go "
        f"from {first['distance']:.1f} to {last['distance']:.1f} lengths of a token away from the "
        "nearest token of the context."
    )


def picture(report: dict[str, Any]) -> Figure:
    """Left: the two answers after each objective. Right: KL and distance while KL is trained."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    bars = (("teacher", "full\ncontext", TEACHER), ("kl", "KL", KL), ("nll", "NLL", NLL))
    ticks = {}
    for first, answer, role in (
        (0, "right", "the right answer"),
        (3.6, "wrong", "the alternative"),
    ):
        for place, (name, label, color) in enumerate(bars):
            value = 100 * report[name][answer]
            left.bar(first + place, value, 0.9, color=color)
            shown = f"{value:.1f} %" if value >= 0.1 else "< 0.1 %"
            left.text(first + place, value + 1.5, shown, ha="center")
            ticks[first + place] = label
        left.text(first + 1, 113, f"{report[answer]}, {role}", ha="center")
    left.axhline(95, linestyle="--", color=TEACHER, linewidth=0.8, zorder=0)
    left.text(6, 96.5, "95 %", ha="right", color=TEACHER)
    left.set_xticks(list(ticks), list(ticks.values()))
    left.set_ylim(0, 120)
    left.set_yticks(range(0, 101, 20))
    left.set_ylabel("probability, %")
    left.set_title(report["held_out_queries"][0], fontsize=11)

    path = report["kl"]["path"]
    steps = [point["step"] for point in path]
    other = right.twinx()
    right.plot(steps, [point["kl"] for point in path], "o-", color=KL)
    other.plot(steps, [point["distance"] for point in path], "s-", color=TEACHER)
    right.set_xticks(steps)
    right.set_ylim(bottom=0)
    other.set_ylim(bottom=0)
    right.set_xlabel("training step")
    right.set_ylabel("KL to the full context, nats", color=KL)
    other.set_ylabel("distance from the context, token lengths", color=TEACHER)
    right.set_title("KL falls while the vectors move away", fontsize=11)
    for axes in (left, right, other):
        axes.spines["top"].set_visible(False)
    left.spines["right"].set_visible(False)
    figure.tight_layout()
    return figure
