"""The pictures of README.md and docs/, from the results files."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib
from render.tables import dtype, grouped

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Row = dict[str, Any]
OURS, PEER, OTHER_PEER, FLOOR = "#c2410c", "#94a3b8", "#cbd5e1", "#334155"


def draw(report: Row, rows: list[Row], growth_rows: list[Row], directory: Path) -> None:
    """report: of the example's evaluation. rows: of the losses in one dtype. growth_rows: of their
    growth."""
    overview(report, rows).savefig(directory / "overview.png", dpi=150)
    growth(growth_rows).savefig(directory / "growth.png", dpi=150)


def overview(report: Row, rows: list[Row]) -> Figure:
    """Left: what the soft prompt recovers. Right: what the losses cost."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1, 1.15])

    P = report["num_virtual_tokens"]
    labels = {
        "no context": "no context",
        "cut context": f"context cut\nto {P} tokens",
        "soft prompt": f"soft prompt,\n{P} tokens",
    }
    for position, (name, label) in enumerate(labels.items()):
        row = report["conditions"][name]
        left.bar(
            position,
            row["kl"],
            yerr=row["kl_standard_error"],
            color=OURS if name == "soft prompt" else PEER,
            width=0.6,
            capsize=4,
        )
        labels[name] = label
    left.set_xticks(range(len(labels)), labels.values())
    left.set_ylabel("nats per answer token")
    left.set_title(f"KL to the full context ({report['context_tokens']} tokens)", fontsize=11)

    shape = max((row["model"], row["T"]) for row in rows)
    shown = [row for row in rows if (row["model"], row["T"]) == shape]
    losses = list(dict.fromkeys(row["loss"] for row in shown))
    found = {(row["loss"], row["implementation"]): row for row in shown}
    names = (
        ("TRL chunked", OTHER_PEER),
        ("PyTorch, torch.compile", PEER),
        ("softprompt_fast", OURS),
    )
    for offset, (name, color) in enumerate(names):
        for position, loss in enumerate(losses):
            if (row := found.get((loss, name))) is None:
                continue  # not every one has every loss
            height = position + 0.26 * offset
            right.barh(height, row["passes"], 0.25, color=color, label=name)
            right.text(
                max(row["passes"], row["floor"]) + 0.15,  # clear of the dashed line
                height,
                f"{row['passes']:.1f} passes, {row['peak_mib']:.0f} MiB",
                va="center",
                fontsize=9,
            )
            right.plot(
                [row["floor"]] * 2, [position - 0.16, position + 0.68], "--", color=FLOOR, zorder=0
            )
    right.set_yticks([0.26 + i for i in range(len(losses))], losses)
    right.set_xlim(0, 1.45 * max(row["passes"] for row in shown))
    right.set_xlabel("bare passes over the head (dashed: as many as the loss needs)")
    title = "Forward + backward, {}, T={T} D={D} V={V}, 2 cores"
    title = title.format(dtype(shown[0]), **shown[0])
    right.set_title(title, fontsize=11)
    handles, names = right.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    right.legend(unique.values(), unique.keys(), loc="upper right", frameon=False, fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


MARKS = {"NLL": "o", "KL": "s", "KL, stored teacher": "^"}


def growth(rows: list[Row]) -> Figure:
    """Time of each token or entry, and memory, against tokens and vocabulary."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 6.4), sharex="col")
    for column, axis in enumerate(("T", "V")):
        here = [row for row in rows if row["axis"] == axis]
        for (loss, name), group in grouped(here, itemgetter("loss", "implementation")).items():
            group = sorted(group, key=lambda row: row[axis])
            sizes = [row[axis] for row in group]
            style = {
                "marker": MARKS[loss],
                "color": OURS if name == "softprompt_fast" else PEER,
                "label": f"{name}, {loss}",
            }
            each = [1e3 * row["milliseconds"] / row[axis] for row in group]
            panels[0][column].plot(sizes, each, **style)
            panels[1][column].plot(sizes, [row["peak_mib"] for row in group], **style)
        other = "V={V}" if axis == "T" else "T={T}"
        panels[0][column].set_title((other + ", D={D}").format(**here[0]), fontsize=11)
        panels[1][column].set_xlabel("tokens T" if axis == "T" else "vocabulary V")
        panels[1][column].set_yscale("log")
        panels[0][column].set_ylim(bottom=0)
        for row in panels:
            row[column].set_xscale("log", base=2)
            row[column].spines[["top", "right"]].set_visible(False)
        panels[0][column].set_ylabel("µs for a token" if axis == "T" else "µs for an entry")
        panels[1][column].set_ylabel("peak MiB")
    figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    return figure


TEACHER_COLOURS = {"one copy": OURS, "a copy for each row": PEER}


def teacher(report: Row) -> Figure:
    """Time and memory of the teacher's queries against the length of the context."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6))
    rows = report["contexts"]
    tokens = [row["tokens"] for row in rows]
    for place, (name, colour) in enumerate(TEACHER_COLOURS.items()):
        style = {"marker": "o", "color": colour, "label": name}
        left.plot(tokens, [row["calls"][place]["seconds"] for row in rows], **style)
        right.plot(tokens, [row["calls"][place]["peak_mib"] for row in rows], **style)
    held = [row["prefix_mib"] for row in rows]
    right.plot(tokens, held, "--", color=FLOOR, label="keys and values of the context, once")
    queries, new = rows[0]["calls"][0]["rows"], report["new_tokens"]
    left.set_title(
        f"{queries} queries, {new} tokens each, written and scored: seconds", fontsize=11
    )
    right.set_title("MiB beyond the model and the context's keys and values", fontsize=11)
    for axes in (left, right):
        axes.set_xlabel("tokens of the context")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure
