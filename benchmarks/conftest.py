"""Keeps the figures of a run as JSON, and prints them as tables when it ends."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from device import ON_GPU
from render import tables
from rich.console import Console

import softprompt_fast as spf

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# A part of a run must not replace a whole one: only that is copied to RESULTS.
LATEST = ROOT / "build" / "bench.json"
PACKAGES = [
    "triton",
    "transformers",
    "liger_kernel",
    "trl",
    "cut_cross_entropy",
    "quack-kernels",
    "unsloth_zoo",
]
KEPT, BEGAN = pytest.StashKey[dict[str, Any]](), pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="benchmarks: every head, T up to 16384")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEPT], config.stash[BEGAN] = {"machine": machine()}, time.monotonic()
    config.option.benchmark_quiet = True  # its own table, 200 columns wide, comes with -v


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """record(section, **figures): kept on disk at once, whatever happens to the next benchmark."""

    def keep(section: str, **figures: Any) -> None:
        results = request.config.stash[KEPT]
        results.setdefault(section, []).append(figures)
        LATEST.parent.mkdir(exist_ok=True)
        LATEST.write_text(as_json(results))

    return keep


def as_json(results: dict[str, Any]) -> str:
    return json.dumps(results, indent=1) + "\n"


def machine() -> dict[str, Any]:
    """Where and with what the figures were measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [text.split(":")[1].strip() for text in cpuinfo if text.startswith("model name")]
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "gpu": torch.cuda.get_device_name() if ON_GPU else None,
        "cpu": models[0] if models else platform.processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "instruction_set": spf.backends.build_info()["instruction_set"],
        "python": platform.python_version(),
        "softprompt_fast": spf.__version__,
        "commit": git.stdout.strip() or "unknown",
        "packages": {name: installed(name) for name in PACKAGES},
        "torch": torch.__version__,
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    results = config.stash[KEPT]
    sections = [name for name in tables.PRINTED if results.get(name)]
    if not sections:
        return
    results["seconds"] = round(time.monotonic() - config.stash[BEGAN])
    LATEST.write_text(as_json(results))
    where = LATEST
    passed = not terminalreporter.stats.get("failed") and not terminalreporter.stats.get("error")
    whole = passed and len(sections) == len(tables.PRINTED) and not config.option.keyword
    if whole:
        name = re.sub(r"[^a-z0-9]+", "-", (results["machine"]["gpu"] or "cpu").lower())
        suffix = "_full" if config.getoption("--full") else ""
        where = RESULTS / f"{'bench-' if ON_GPU else ''}{name}{suffix}.json"
        where.parent.mkdir(exist_ok=True)
        where.write_text(as_json(results))
    console = Console(width=132)
    with console.capture() as capture:
        for name in sections:
            for part in tables.PRINTED[name](results[name]):
                console.print(part)
    terminalreporter.write_line("")
    terminalreporter.write(capture.get())
    terminalreporter.write_line(f"{results['seconds']} s. Written to {os.path.relpath(where)}")
