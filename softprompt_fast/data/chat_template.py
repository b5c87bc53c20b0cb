"""What a chat template reads besides the messages: variables of its own, and today's date.

A soft prompt stands in the text that they lead to, so they are recorded with it, as its facts
``chat_template_kwargs`` and ``chat_template_date``. A tokenizer has them as attributes of these
names: whatever takes a tokenizer renders the same text.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from datetime import date, datetime
from typing import Any

from jinja2 import Environment, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from ..utils.console import progress
from ..utils.errors import OptionError

KWARGS, DATE = "chat_template_kwargs", "chat_template_date"
# A function that transformers gives to every template. It reads the clock.
CLOCK = "strftime_now"
DATE_STRING = "date_string"
RESERVED = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *("messages", "conversations", "raise_exception", CLOCK),
}


def parse_kwargs(value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """The variables that an option ``chat_template_kwargs`` holds: JSON values, or their text.

    Raises OptionError if it is something else, or sets what the renderer itself sets.
    """
    if value is None:
        return None
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        kwargs = json.loads(text, parse_constant=_refuse)
        json.dumps(kwargs, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{KWARGS} is no JSON: {error}; got {value!r}") from error
    if not isinstance(kwargs, dict):
        raise OptionError(
            f'{KWARGS} must be a JSON object, as {{"enable_thinking": false}}: got {value!r}'
        )
    for name in kwargs:
        if name in RESERVED:
            raise OptionError(f"{KWARGS} cannot set {name!r}: the renderer of templates sets it")
    return kwargs


def bind_template(
    tokenizer: Any,
    chat_template_kwargs: dict[str, Any] | str | None = None,
    chat_template_date: str | None = None,
) -> None:
    """From now on ``tokenizer`` renders chats with these variables, and with this date if it asks.

    chat_template_date: as 2026-11-27; None is today. Notes tell the date, and the variables that
    the template never reads.

    Raises OptionError as ``parse_kwargs``, if there is no template that could read variables, and
    if the date is none.
    """
    variables, names = parse_kwargs(chat_template_kwargs) or {}, names_read(tokenizer)
    day = chat_template_date or today()
    try:
        day = date.fromisoformat(day).isoformat()
    except (TypeError, ValueError) as error:
        raise OptionError(f"{DATE} must be a date, as 2026-11-27: got {day!r}") from error
    if variables and names is None:
        raise OptionError(f"{KWARGS} {variables}: the model has no chat template to read them")
    unread = ", ".join(name for name in variables if name not in (names or ()))
    if unread:
        progress(f"Note: the chat template never reads {unread}")
    tokenizer.chat_template_kwargs, tokenizer.chat_template_date = variables, None
    if CLOCK in (names or ()):
        tokenizer.chat_template_date = day
        progress(f"Note: the chat template asks for today's date, and is given {day} from now on")


def today() -> str:
    return date.today().isoformat()


def template_facts(tokenizer: Any) -> dict[str, Any]:
    """What is bound to ``tokenizer``, by name; only where there is something."""
    return recorded_template({name: getattr(tokenizer, name, None) for name in (KWARGS, DATE)})


def recorded_template(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of recorded facts that were ``template_facts``: arguments of ``load_model``."""
    return {name: facts[name] for name in (KWARGS, DATE) if facts.get(name)}


def server_kwargs(tokenizer: Any) -> dict[str, Any]:
    """The variables with which a server renders what is rendered here.

    A server has a clock of its own. Llama's templates take the date as a variable in its place.
    """
    bound = template_facts(tokenizer)
    kwargs = bound.get(KWARGS, {})
    if DATE in bound and DATE_STRING in (names_read(tokenizer) or ()):
        day = datetime.fromisoformat(bound[DATE])
        kwargs = {DATE_STRING: day.strftime("%d %b %Y"), **kwargs}
    return kwargs


def apply_template(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
    """``tokenizer.apply_chat_template`` with what is bound to it."""
    bound = template_facts(tokenizer)
    if DATE in bound:
        options["chat_template"] = _dated(tokenizer.get_chat_template(), bound[DATE])
    return tokenizer.apply_chat_template(messages, **bound.get(KWARGS, {}), **options)


def names_read(tokenizer: Any) -> set[str] | None:
    """The variables and functions that the template reads and does not make; None without one."""
    try:
        template = tokenizer.get_chat_template()
    except (AttributeError, ValueError):  # transformers says so where there is none, or no default
        return None
    try:
        return find_undeclared_variables(_SYNTAX.parse(template))
    except TemplateError:
        return set()  # whoever renders it says what is wrong


def _dated(template: str, day: str) -> str:
    """The template, in which it is always midnight of ``day``.

    transformers hands no functions of ours on to a template, but a macro in it hides the clock.
    """
    moment = datetime.fromisoformat(day)
    directives = sorted(set(re.findall("%-?[A-Za-z]", template)))
    # A percent sign that is meant as such is out of the way meanwhile.
    replaced = [("%%", "\0"), *((d, moment.strftime(d)) for d in directives), ("\0", "%")]
    # Text in quotes is alike in JSON and in Jinja.
    steps = (f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in replaced)
    text = "{{ format" + "".join(steps) + " }}"
    # The line break goes with the block, and what follows begins a line as it did.
    return f"{{% macro {CLOCK}(format) %}}{text}{{% endmacro %}}\n{template}"


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``, which transformers adds to Jinja."""

    tags = {"generation"}  # noqa: RUF012  # as declared there

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


_SYNTAX = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
