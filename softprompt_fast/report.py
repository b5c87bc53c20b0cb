"""An evaluation report as tables for a person."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from .console import one_line
from .evaluate import CONDITIONS, CUT, SOFT


def table(report: dict[str, Any]) -> Table:
    """The report's conditions, for ``rich`` to print."""
    title = (
        f"{report['queries']} held-out queries, {report['answer_tokens']} answer tokens; "
        f"{report['context_tokens']} context tokens -> {report['num_virtual_tokens']} virtual"
    )
    result = Table(title=title, title_justify="left")
    result.add_column("what the model reads")
    for heading in ("KL, nats/token", "top-1", "perplexity", "KL recovered"):
        result.add_column(heading, justify="right")
    for name, row in report["conditions"].items():
        error = row["kl_standard_error"]
        recovered = row["kl_recovered"]
        label = f"{name} ({report['num_virtual_tokens']} tokens)" if name in (CUT, SOFT) else name
        result.add_row(
            label,
            f"{row['kl']:.3f}" + ("" if error is None else f" ± {error:.3f}"),
            f"{row['top1_agreement']:.1%}",
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
        result.add_row("query", Text(one_line(answer["query"]), style="bold"))
        for name in CONDITIONS:
            result.add_row(name, Text(one_line(answer[name])))
        result.add_section()
    return result
