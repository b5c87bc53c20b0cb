"""The compression curve as JSON values: how faithful prompts are, by length and by objective."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.baselines import CUT, NONE, PRUNED, RETRIEVED, SOFT
from ..training.run_directory import EVALUATION_FILE, read_run
from ..utils.files import read_json

FORMAT_VERSION = 1
# Of a row of a report.
FIGURES = (
    *("kl", "kl_standard_error", "kl_recovered"),
    *("top1_agreement", "perplexity_ratio", "rank_correlation"),
)
# Of a report, the same in all runs of a sweep.
SHARED = (
    *("model", "placement", "context_tokens", "queries", "answer_tokens", "max_new_tokens"),
    *("standard_error", "eval_file_sha256", "versions"),
)
# Of a run's options, those in which the runs of a sweep differ.
SWEPT = ("num_virtual_tokens", "objective")


def compression_curve(directories: Sequence[Path]) -> dict[str, Any]:
    """From the run.json and evaluation.json of finished runs, all of one sweep.

    rows: one for each run, with FIGURES of its soft prompt, steps and seconds of its training
    baselines: "no context" and "retrieved chunk" with FIGURES; "cut context" and "pruned
    context" with a row for each P
    options: of the training, but for SWEPT; and SHARED, unless there are no runs yet
    """
    reports = [read_json(directory / EVALUATION_FILE) for directory in directories]
    runs = [read_run(directory) for directory in directories]
    curve: dict[str, Any] = {"format_version": FORMAT_VERSION, "rows": [], "baselines": {}}
    for directory, report, run in zip(directories, reports, runs, strict=True):
        row = {"run": directory.name, "objective": run["objective"], **_point(report, SOFT)}
        curve["rows"].append({**row, "steps": run["steps"], "seconds": run["seconds"]})
    if not reports:
        return curve
    first = reports[0]
    by_length = {report["num_virtual_tokens"]: report for report in reports}
    # Reports of earlier versions have no retrieved chunk.
    alone = [name for name in (NONE, RETRIEVED) if name in first["conditions"]]
    curve["baselines"] = {
        **{name: {f: first["conditions"][name][f] for f in FIGURES} for name in alone},
        **{name: [_point(by_length[P], name) for P in sorted(by_length)] for name in (CUT, PRUNED)},
    }
    options = {name: value for name, value in runs[0]["options"].items() if name not in SWEPT}
    return {**curve, "options": options, **{name: first[name] for name in SHARED}}


def is_measured(directory: Path, facts: dict[str, Any]) -> bool:
    """Whether the run has a report with these values: of the same queries, above all."""
    file = directory / EVALUATION_FILE
    if not file.is_file():
        return False
    try:
        report = read_json(file)
    except ValueError:
        return False  # what is damaged is measured again
    return all(report.get(name) == value for name, value in facts.items())


def _point(report: dict[str, Any], condition: str) -> dict[str, Any]:
    row = report["conditions"][condition]
    P = report["num_virtual_tokens"]
    return {"num_virtual_tokens": P, **{figure: row[figure] for figure in FIGURES}}
