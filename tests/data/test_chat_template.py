"""What a chat template is given besides the messages, wherever its tokenizer goes."""

from __future__ import annotations

import pytest
from clock import TEMPLATE, set_day
from toy import CHAT_TEMPLATE, make_tokenizer

from softprompt_fast.base_model.fingerprint import tokenizer_facts
from softprompt_fast.data.chat_template import (
    apply_template,
    bind_template,
    names_read,
    parse_kwargs,
    server_kwargs,
)
from softprompt_fast.data.queries import teacher_ids, tokenize_query
from softprompt_fast.utils.errors import OptionError

USER = {"role": "user", "content": "When do you open?"}
DAYS = ["2026-11-27", "2024-02-29", "2031-05-01"]
CLOCKS = {
    "llama": TEMPLATE,
    "gpt-oss": (
        "{%- macro head() -%}{{ 'Current date: ' + strftime_now('%Y-%m-%d') }}{%- endmacro -%}"
        "{{- head() }}{% generation %}.{% endgeneration %}"
    ),
    "mistral": (
        "{% set day = strftime_now('%d') | int - 1 %}"
        "{% set (m, y) = strftime_now('%b %Y').split() %}"
        "{{ day }} {{ m }} {{ y }} {{ strftime_now(format='%A %-d.%-m.%y, %j, %U%% %%d') }}"
    ),
    "blank start": "\n  {% if strftime_now is defined %}\n x {{ strftime_now('%c') }}{% endif %}\n",
    "line start": "   {% for m in messages %}\n{{ strftime_now('\"%x\"') }}{% break %}{% endfor %}",
}


def with_template(template: str | dict[str, str] | None, *bound):
    tokenizer = make_tokenizer.__wrapped__(chat=False)
    tokenizer.chat_template = template
    bind_template(tokenizer, *bound)
    return tokenizer


def rendered(tokenizer) -> str:
    return apply_template(tokenizer, [USER], tokenize=False, add_generation_prompt=True)


def test_every_rendering_has_the_variables():
    asked = with_template(TEMPLATE, {"enable_thinking": False})
    query = tokenize_query(asked, [USER], "Open at 10.")
    for ids in (teacher_ids(query), query.plain):
        assert asked.decode(ids).endswith("<|start|>assistant\n<think>\n\n</think>\n\n")
    for kwargs in (None, {}, {"enable_thinking": True}):
        query = tokenize_query(with_template(TEMPLATE, kwargs), [USER], "Open at 10.")
        assert asked.decode(query.plain).endswith("<|start|>assistant\n")


@pytest.mark.parametrize("template", CLOCKS)
def test_a_recorded_day_reads_as_the_clock_did_that_day(monkeypatch, template):
    plain = with_template(None)
    plain.chat_template = CLOCKS[template]
    texts = []
    for day in DAYS:
        set_day(monkeypatch, day)
        texts.append(rendered(plain).replace("23:59:58", "00:00:00"))
    assert len(set(texts)) == len(DAYS)
    set_day(monkeypatch, "2030-01-01")
    for day, text in zip(DAYS, texts, strict=True):
        assert rendered(with_template(CLOCKS[template], None, day)) == text


def test_the_day_is_fixed_and_told_once(monkeypatch, capsys):
    set_day(monkeypatch, DAYS[0])
    tokenizer = with_template(TEMPLATE)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == f"Note: the chat template asks for today's date, and is given {DAYS[0]} from now on"
    )
    before = rendered(tokenizer)
    assert "27 Nov 2026" in before
    set_day(monkeypatch, DAYS[1])
    assert rendered(tokenizer) == before
    assert tokenizer_facts(tokenizer)["chat_template_date"] == DAYS[0]
    assert tokenizer_facts(with_template(TEMPLATE))["chat_template_date"] == DAYS[1]
    assert not capsys.readouterr().err.count(DAYS[0])


def test_nothing_is_recorded_of_a_template_that_is_given_nothing(capsys):
    assert set(tokenizer_facts(with_template(CHAT_TEMPLATE))) == {"tokenizer", "chat_template"}
    assert set(tokenizer_facts(with_template(None))) == {"tokenizer", "chat_template"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "template",
    [TEMPLATE, {"default": TEMPLATE, "tool_use": "{{ unheard }}"}],
    ids=["one", "named ones"],
)
def test_a_variable_that_is_never_read_is_told(template, capsys):
    kwargs = {"enable_thinking": False, "thinking": 1, "unheard": 2, "messages_": 3}
    with_template(template, kwargs, DAYS[0])
    notes = capsys.readouterr().err
    assert "Note: the chat template never reads thinking, unheard, messages_\n" in notes


def test_what_a_template_reads():
    assert names_read(
        with_template("{% set a = b %}{{ a }}{% for c in d %}{{ c }}{% endfor %}")
    ) == {
        "b",
        "d",
    }
    assert names_read(with_template(CLOCKS["gpt-oss"])) == {"strftime_now"}
    assert names_read(with_template("{{ broken")) == set()
    assert names_read(with_template({"tool_use": "{{ b }}"})) is None  # none for a plain chat
    assert names_read(with_template(None)) is None


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("{'enable_thinking': false}", "is no JSON: Expecting property name"),
        ("", "is no JSON: "),
        ('{"budget": NaN}', "is no JSON: NaN is no JSON value"),
        ('{"name": "\\ud800"}', "is no JSON: 'utf-8' codec can't encode"),
        ({"today": object()}, "is no JSON: Object of type object is not JSON serializable"),
        ("false", "must be a JSON object, as {\"enable_thinking\": false}: got 'false'"),
        ('["enable_thinking"]', "must be a JSON object"),
        *(
            (f'{{"{name}": 1}}', f"cannot set '{name}': the renderer of templates sets it")
            for name in ("messages", "tools", "add_generation_prompt", "tokenize", "strftime_now")
        ),
    ],
)
def test_what_is_no_set_of_variables_is_named(value, problem):
    with pytest.raises(OptionError) as error:
        parse_kwargs(value)
    assert str(error.value).startswith(f"chat_template_kwargs {problem}")


def test_variables_as_text_or_not():
    assert parse_kwargs(' {"a": [1, null]}') == parse_kwargs({"a": (1, None)}) == {"a": [1, None]}
    assert parse_kwargs(None) is None
    assert parse_kwargs("{}") == {}


def test_what_cannot_be_bound_is_named():
    with pytest.raises(OptionError, match=r"\{'a': 1\}: the model has no chat template to read"):
        with_template(None, {"a": 1})
    for day in ("27 Nov 2026", "2026-13-01"):
        with pytest.raises(OptionError, match=f"chat_template_date must be a date, .*got '{day}'"):
            with_template(TEMPLATE, None, day)


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"date_string": "26 Jul 2024"}])
def test_a_server_is_told_the_day_where_the_template_takes_it(monkeypatch, kwargs):
    tokenizer = with_template(TEMPLATE, kwargs, DAYS[1])
    expected = rendered(tokenizer)
    assert ("29 Feb 2024" in expected) == ("date_string" not in kwargs)
    set_day(monkeypatch, DAYS[2])
    server = with_template(None)
    server.chat_template = TEMPLATE
    options = {"tokenize": False, "add_generation_prompt": True, **server_kwargs(tokenizer)}
    assert server.apply_chat_template([USER], **options) == expected
    assert server_kwargs(with_template(CLOCKS["gpt-oss"])) == {}
