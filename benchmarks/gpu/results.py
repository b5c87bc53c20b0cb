"""The results of ``make gpu``: a JSON file and its tables in Markdown, written at every record."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# One record each; the others are lists of records.
SINGLE = ("machine", "ceilings")


class Results:
    """Kept on disk after every record, so that nothing is lost when the run is cut off."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.json, self.markdown = directory / f"{name}.json", directory / f"{name}.md"
        self.data: dict[str, Any] = {"kind": "gpu"}
        self._lock = threading.Lock()

    def add(self, table: str, record: Record) -> None:
        with self._lock:
            if table in SINGLE:
                self.data.setdefault(table, {}).update(record)
            else:
                self.data.setdefault(table, []).append(record)
            replace_text(self.json, json.dumps(self.data, indent=1) + "\n")
            replace_text(self.markdown, markdown(self.data))


def replace_text(path: Path, text: str) -> None:
    """A reader, or a kill, meets the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def markdown(data: Record) -> str:
    """Everything that was measured, with where and on what."""
    parts = [f"# make gpu on {data.get('machine', {}).get('gpu', 'an unknown GPU')}"]
    parts.append(machine_line(data))
    for title, name, render in SECTIONS:
        if data.get(name):
            parts += [f"## {title}", render(data[name])]
    return "\n\n".join(parts) + "\n"


def machine_line(data: Record) -> str:
    machine, ceilings = data.get("machine", {}), data.get("ceilings")
    names = ("torch", "cuda", "triton", "python", "driver", "commit")
    facts = [f"{name} {machine[name]}" for name in names if machine.get(name)]
    if machine.get("changes"):
        facts[-1] += " with uncommitted changes"
    if ceilings:
        facts.append(f"copy {ceilings['copy_gb_per_second']:.0f} GB/s (read and written)")
        facts.append(f"bf16 matrix product {ceilings['mm_tflops']:.0f} TFLOP/s")
    return ", ".join([str(machine.get("gpu", "unknown GPU")), *facts]) + "."


def loss_table(rows: list[Record]) -> str:
    """Forward and backward. *of the floor*: against the bare products that no loss avoids."""
    return table(
        rows,
        {
            "loss": "{loss}",
            "T": "{T}",
            "D": "{D}",
            "V": "{V}",
            "backend": "{backend}",
            "workspace MiB": "{workspace_mib:g}",
            "ms": "{milliseconds:.3g}",
            "spread": "{spread:.1%}",
            "bare passes": "{passes:.2f}",
            "of the floor": "{ratio:.2f}",
            "graph ms": "{graph_milliseconds:.3g}",
            "host µs": "{host_microseconds:.0f}",
            "peak MiB": "{peak_mib:.0f}",
            "gradient error": "{gradient_error:.1e}",
            "target": target_text,
        },
    )


def target_text(row: Record) -> str:
    """Each limit, and whether the row keeps it."""
    names = {
        "milliseconds": "{:g} ms",
        "graph_milliseconds": "{:g} ms as a graph",
        "peak_mib": "{:.0f} MiB",
        "ratio": "{:g} of the floor",
    }
    return ", ".join(
        names[name].format(limit) + (" met" if row[name] <= limit else " **missed**")
        for name, limit in (row["target"] or {}).items()
        if row[name] is not None
    )


def kernel_table(rows: list[Record]) -> str:
    """*of a copy*: against a copy on the device that moves as many bytes."""
    return table(
        rows,
        {
            "row kernel": "{loss}",
            "backend": "{backend}",
            "C": "{C}",
            "V": "{V}",
            "µs": lambda row: f"{1e3 * row['milliseconds']:.0f}",
            "GB/s": "{gb_per_second:.0f}",
            "of a copy": "{ratio:.2f}",
            "gradient error": "{gradient_error:.1e}",
        },
    )


def plain_table(rows: list[Record]) -> str:
    return table(rows, {name: f"{{{name}}}" for name in rows[0]})


def table(rows: Iterable[Record], columns: dict[str, str | Callable[[Record], str]]) -> str:
    """A Markdown table; a figure that was not measured is a dash."""

    def cell(row: Record, content: str | Callable[[Record], str]) -> str:
        if callable(content):
            return content(row)
        name = content[1:-1].split(":")[0]
        return "–" if row.get(name) is None else content.format(**row).replace("|", "\\|")

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row, c) for c in columns.values()) + " |" for row in rows]
    return "\n".join(lines)


SECTIONS: list[tuple[str, str, Callable[[list[Record]], str]]] = [
    ("Steps", "steps", plain_table),
    ("First check of every loss", "smoke", plain_table),
    ("Losses, forward and backward", "rows", loss_table),
    ("Row kernels alone", "row_kernels", kernel_table),
    ("compute-sanitizer", "sanitizer", plain_table),
    ("Tests that failed", "failed_tests", plain_table),
    ("Rows that are bitwise the same in a smaller batch", "batches", plain_table),
]
