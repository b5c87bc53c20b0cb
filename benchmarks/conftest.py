"""Collects the rows of a run into benchmarks/results/ and prints them as a table."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

import softprompt_fast as spf

RESULTS = Path(__file__).parent / "results" / "cpu.json"
ROWS = pytest.StashKey[list]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def record_row(request: pytest.FixtureRequest):
    """Call with the figures of one benchmark; they are kept whatever happens to the next one."""

    def record(*, shape, **figures) -> None:
        rows = request.config.stash[ROWS]
        rows.append({**asdict(shape), **figures})
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")

    return record


def machine() -> dict[str, str | int]:
    """Where and with what the figures were measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "instruction_set": spf.backends.build_info()["instruction_set"],
        "torch": torch.__version__,
        "softprompt_fast": spf.__version__,
        "commit": git.stdout.strip() or "unknown",
    }


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    table = Table("shape", "loss", "implementation")
    for title in ("ms", "passes", "of floor", "MiB"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            f"{row['model']} T={row['T']} D={row['D']} V={row['V']}",
            row["loss"],
            row["implementation"],
            f"{row['milliseconds']:.0f}",
            f"{row['passes']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['peak_mib']:.0f}",
        )
    terminalreporter.write_line("")
    console = Console(width=110)
    with console.capture() as capture:
        console.print(table)
    terminalreporter.write(capture.get())
    terminalreporter.write_line(
        "A pass is one bare torch.mm over the head, timed in the same run; of floor: time against "
        "passes the loss\ncannot avoid. MiB: peak beyond inputs and gradient. Written to "
        f"{os.path.relpath(RESULTS)}"
    )
