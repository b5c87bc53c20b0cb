"""The pictures of an evaluation report, as PNG files in memory.

Each function draws one of them into ``axes`` from the report's JSON values and nothing else, and
returns whether there was anything to draw.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..baselines import CUT, FULL, NONE, PRUNED, RETRIEVED, SOFT

COLOURS = {
    FULL: "#222222",
    NONE: "#b5b5b5",
    CUT: "#c9871f",
    PRUNED: "#8a6fb3",
    RETRIEVED: "#4b9b6e",
    SOFT: "#1f6fb4",
}
COMPARED = (NONE, CUT, PRUNED, RETRIEVED, SOFT)
# A mean over fewer answers than this share of them is of those few that are long.
SHARE_OF_ANSWERS = 0.1
# KL below it is rounding; the axis of its distribution begins here.
LEAST_KL = 1e-4
INCHES, DPI = (6.4, 3.4), 160


def kl_by_position(axes: Axes, report: dict[str, Any]) -> bool:
    last = _last_position(report)
    _draw_by_position(axes, report, COMPARED, "kl_by_position", last)
    axes.set_ylabel("KL to the full context, nats")
    axes.set_ylim(bottom=0)
    return True


def entropy_by_position(axes: Axes, report: dict[str, Any]) -> bool:
    last = _last_position(report)
    _draw_by_position(axes, report, (NONE, FULL, SOFT), "entropy_by_position", last)
    axes.set_ylabel("entropy, nats")
    axes.set_ylim(bottom=0)
    return True


def kl_distribution(axes: Axes, report: dict[str, Any]) -> bool:
    """How many tokens are worse than so much: the tail is what practitioners look at."""
    shares = [1 - share for share in report["quantiles"]][:-1]
    for name in COMPARED:
        values = [max(kl, LEAST_KL) for kl in report["series"][name]["kl_quantiles"]]
        axes.plot(values[:-1], shares, color=COLOURS[name], label=name, lw=_width(name))
        axes.plot(values[-1], shares[-1] / 2, "x", color=COLOURS[name], ms=6)
    row = report["conditions"][SOFT]
    for key, share, text in (
        ("kl_median", 0.5, "median"),
        ("kl_99", 0.01, "99 %"),
        ("kl_999", 0.001, "99.9 %"),
    ):
        place = (max(row[key], LEAST_KL), share)
        axes.plot(*place, "o", color=COLOURS[SOFT], ms=4)
        axes.annotate(
            f"{text}: {row[key]:.3g}",
            place,
            xytext=(-6, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            color=COLOURS[SOFT],
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("KL to the full context, nats (×: the largest)")
    axes.set_ylabel("share of answer tokens above")
    axes.set_yticks([1, 0.1, 0.01, 0.001], ["100 %", "10 %", "1 %", "0.1 %"])
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    return True


def calibration(axes: Axes, report: dict[str, Any]) -> bool:
    axes.plot([0, 1], [0, 1], color="#999999", lw=1, ls="--")
    for name in (NONE, SOFT):
        bins = report["series"][name]["calibration"]
        total = sum(part["tokens"] for part in bins)
        xs = [part["confidence"] for part in bins]
        ys = [part["teacher_confidence"] for part in bins]
        sizes = [12 + 300 * part["tokens"] / total for part in bins]
        axes.plot(xs, ys, color=COLOURS[name], lw=1)
        axes.scatter(xs, ys, s=sizes, color=COLOURS[name], alpha=0.7, lw=0)
        error = report["conditions"][name]["calibration_error"]
        axes.plot([], [], "o-", color=COLOURS[name], label=f"{name}: off by {error:.1%}")
    axes.set_xlabel("probability of the model's first choice")
    axes.set_ylabel("what the full context gives it")
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return True


def training_curve(axes: Axes, report: dict[str, Any]) -> bool:
    curve = report.get("training_curve")
    if not curve or not curve["step"]:
        return False
    marker = "o" if len(curve["step"]) == 1 else None
    axes.plot(curve["step"], curve["loss"], color=COLOURS[SOFT], lw=0.8, alpha=0.4)
    # Batches differ more from each other than one step does from the next.
    style: Any = {"color": COLOURS[SOFT], "lw": 2, "marker": marker}
    axes.plot(curve["step"], _running_mean(curve["loss"]), **style)
    if curve["eval_step"]:
        axes.plot(curve["eval_step"], curve["eval_loss"], "o-", color=COLOURS[CUT], ms=3, lw=1)
        axes.annotate(
            "held out",
            (curve["eval_step"][-1], curve["eval_loss"][-1]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="right",
            color=COLOURS[CUT],
            fontsize=8,
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per answer token")
    axes.set_ylim(bottom=min(0, *curve["loss"]))
    return True


PLOTS: dict[str, Callable[[Axes, dict[str, Any]], bool]] = {
    "kl_by_position": kl_by_position,
    "kl_distribution": kl_distribution,
    "calibration": calibration,
    "entropy_by_position": entropy_by_position,
    "training_curve": training_curve,
}


def pictures(report: dict[str, Any]) -> dict[str, bytes]:
    """PNG files, by the names of PLOTS; those that there is nothing for are left out."""
    found = {}
    for name, draw in PLOTS.items():
        figure, axes = blank(INCHES)
        if draw(axes, report):
            found[name] = png(figure)
    return found


def blank(inches: tuple[float, float]) -> tuple[Figure, Axes]:
    # Not pyplot: it keeps figures, and asks for a screen.
    figure = Figure(figsize=inches, dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_by_position(
    axes: Axes, report: dict[str, Any], names: tuple[str, ...], key: str, last: int
) -> None:
    for name in names:
        values = report["series"][name][key][:last]
        marker = "o" if last == 1 else None
        style: Any = {"color": COLOURS[name], "lw": _width(name), "marker": marker}
        axes.plot(range(1, last + 1), values, label=name, **style)
    axes.set_xlabel("token of the answer")
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _running_mean(values: list[float]) -> list[float]:
    """Over the last tenth of all values up to each."""
    window = max(1, len(values) // 10)
    sums = [0.0, *accumulate(values)]
    ends = range(1, len(sums))
    return [(sums[end] - sums[max(0, end - window)]) / min(end, window) for end in ends]


def _last_position(report: dict[str, Any]) -> int:
    """Up to where a mean is over enough answers."""
    counts = report["tokens_by_position"]
    return sum(count >= SHARE_OF_ANSWERS * report["queries"] for count in counts)


def _width(name: str) -> float:
    return 2.2 if name == SOFT else 1.4
