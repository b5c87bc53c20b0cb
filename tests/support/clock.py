"""Another day, for chat templates and for us; and a template that asks which day it is."""

from __future__ import annotations

import datetime

from toy import CHAT_TEMPLATE

# As Llama 3.2 and Qwen 3 do.
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
)
TEMPLATE = (
    DATED
    + CHAT_TEMPLATE.replace(
        "{{ message['content'] | trim }}",
        "{% if loop.first %}{{ date_string }}: {% endif %}{{ message['content'] | trim }}",
    )
    + (
        "{% if enable_thinking is defined and enable_thinking is false and add_generation_prompt %}"
        "<think>\n\n</think>\n\n{% endif %}"
    )
)


def set_day(monkeypatch, day: str) -> None:
    """What the clock says from now on, a little before midnight."""
    moment = datetime.datetime.fromisoformat(f"{day}T23:59:58")

    class Moment(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    class Day(datetime.date):
        @classmethod
        def today(cls):
            return moment.date()

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Moment)
    monkeypatch.setattr("softprompt_fast.data.chat_template.date", Day, raising=False)
