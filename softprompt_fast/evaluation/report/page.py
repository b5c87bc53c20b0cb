"""The report as one HTML page that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...utils.console import printable
from ...utils.text import shortened
from ..baselines import CONDITIONS, FULL
from .plots import COLOURS

# Of a query or an answer on the page.
CHARACTERS = 4000
# The KL, in nats, at which the colour of a token is strongest.
STRONGEST_KL = 2.0

FORMS = {
    "count": "{:,}",
    "nats": "{:.3f}",
    "percent": "{:.1%}",
    "ratio": "{:.2f}",
    "text": "{}",
}


def page(report: dict[str, Any], pictures: Mapping[str, bytes]) -> str:
    """``report`` as ``Evaluation.report`` makes it. All that comes from data is escaped."""
    environment = Environment(
        # Of every template, whatever it is called.
        autoescape=True,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    environment.filters["colour"] = colour
    environment.globals["figure"] = lambda form, *path: figure(report, form, *path)
    return environment.get_template("page.html").render(
        report=report,
        conditions=CONDITIONS,
        compared=[name for name in CONDITIONS if name != FULL],
        colours=COLOURS,
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        strongest_kl=STRONGEST_KL,
    )


def figure(report: dict[str, Any], form: str, *path: str | int) -> Markup:
    """A number of the report, and where it stands there: ``conditions/soft prompt/kl``."""
    value = reduce(getitem, path, cast(Any, report))
    if value is None:
        return Markup("<span>–</span>")
    if isinstance(value, str):
        value = exact = shown(value)
    else:
        exact = repr(value)
    return Markup('<span class="figure" data-json="{}" title="{}">{}</span>').format(
        "/".join(map(str, path)), exact, FORMS[form].format(value)
    )


def shown(text: str) -> str:
    """Whatever data or model wrote, with control characters spelled out, and not endless."""
    return printable(shortened(text, CHARACTERS))


def colour(kl: float) -> str:
    """The background of a token. By the root: small differences are to be seen too."""
    strength = min(1.0, max(0.0, kl) / STRONGEST_KL) ** 0.5
    return f"rgba(214, 74, 36, {0.85 * strength:.3f})"
