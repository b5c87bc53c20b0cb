"""An evaluation report as tables on the screen."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from ...utils.console import one_line
from ...utils.text import shortened
from ..baselines import CONDITIONS

# Of a query or an answer on the screen.
CHARACTERS = 600


def table(report: dict[str, Any]) -> Table:
    """The report's conditions, for ``rich`` to print."""
    context = f"{report['context_tokens']} context tokens"
    if report["excerpt_tokens"] < report["context_tokens"]:
        context += f", read in excerpts of up to {report['excerpt_tokens']},"
    title = (
        f"{report['queries']} held-out queries, {report['answer_tokens']} answer tokens; "
        f"{context} -> {report['num_virtual_tokens']} virtual"
    )
    result = Table(title=title, title_justify="left")
    result.add_column("model reads", no_wrap=True)
    result.add_column("KL, nats", justify="right", no_wrap=True)
    for heading in ("top-1", "RMS Δp", "perpl.", "KL recovered"):
        result.add_column(heading, justify="right")
    for name, row in report["conditions"].items():
        recovered = row["kl_recovered"]
        result.add_row(
            name,
            kl_with_error(row),
            f"{row['top1_agreement']:.1%}",
            f"{row['rms_delta_p']:.1%}",
            f"{row['perplexity']:.2f}",
            "" if recovered is None else f"{recovered:.1%}",
        )
    return result


def side_by_side(report: dict[str, Any]) -> Table:
    """The answers of the report, for ``rich`` to print."""
    result = Table(title="answers", title_justify="left", show_header=False)
    result.add_column(no_wrap=True)
    result.add_column()
    for answer in report["answers"]:
        # Text: what the data or the model wrote is neither markup nor terminal control.
        result.add_row("query", Text(_shown(answer["query"]), style="bold"))
        for name in CONDITIONS:
            result.add_row(name, Text(_shown(answer[name])))
        result.add_section()
    return result


def kl_with_error(row: dict[str, Any]) -> str:
    error = row["kl_standard_error"]
    return f"{row['kl']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _shown(text: str) -> str:
    return one_line(shortened(text, CHARACTERS))
