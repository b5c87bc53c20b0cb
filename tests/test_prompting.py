"""Where the context stands among the tokens of a query."""

from __future__ import annotations

import pytest
from toy import make_tokenizer

from softprompt_fast.prompting import (
    cut_ids,
    student_layout,
    teacher_ids,
    tokenize_answer,
    tokenize_query,
)

USER = {"role": "user", "content": "When do you open?"}
OWN_SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = "<|start|>assistant\n"
NO_SYSTEM_ROLE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
SILENT_ABOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}"
)


def with_template(start: str = "", end: str = ""):
    tokenizer = make_tokenizer.__wrapped__()
    tokenizer.chat_template = start + tokenizer.chat_template + end
    return tokenizer


def test_the_context_is_the_system_message():
    tokenizer = make_tokenizer()
    query = tokenize_query(tokenizer, [USER], " Open at 10.\n", source="data.jsonl:1")
    assert tokenizer.decode(teacher_ids(query)) == (
        f"<|start|>system\nOpen at 10.<|end|>\n<|start|>user\nWhen do you open?<|end|>\n{ASSISTANT}"
    )
    assert tokenizer.decode(query.context) == "Open at 10."
    assert tokenizer.decode(query.plain) == f"<|start|>user\nWhen do you open?<|end|>\n{ASSISTANT}"
    assert query.source == "data.jsonl:1"


def test_a_system_message_of_the_data_follows_the_context():
    tokenizer = make_tokenizer()
    query = tokenize_query(tokenizer, [OWN_SYSTEM, USER], "Open at 10.")
    text = tokenizer.decode(teacher_ids(query))
    assert text.startswith("<|start|>system\nOpen at 10.\n\nBe brief.<|end|>\n<|start|>user\nWhen")
    assert tokenizer.decode(query.plain).startswith("<|start|>system\nBe brief.<|end|>")


@pytest.mark.parametrize("template", [NO_SYSTEM_ROLE, SILENT_ABOUT_SYSTEM], ids=["raise", "drop"])
def test_without_a_system_role_the_context_opens_the_first_user_message(template):
    tokenizer = with_template(template)
    query = tokenize_query(tokenizer, [OWN_SYSTEM, USER], "Open at 10.")
    assert tokenizer.decode(teacher_ids(query)) == (
        f"<|start|>user\nOpen at 10.\n\nBe brief.\n\nWhen do you open?<|end|>\n{ASSISTANT}"
    )
    assert tokenizer.decode(query.plain) == (
        f"<|start|>user\nBe brief.\n\nWhen do you open?<|end|>\n{ASSISTANT}"
    )


def test_without_a_chat_template():
    tokenizer = make_tokenizer(chat=False)
    query = tokenize_query(tokenizer, [USER], "Open at 10.")
    assert tokenizer.decode(teacher_ids(query)) == "<|bos|>Open at 10.\n\nWhen do you open?\n"
    assert query.before == [tokenizer.bos_token_id]
    assert tokenizer.decode(query.plain) == "<|bos|>When do you open?\n"


def test_layouts():
    query = tokenize_query(make_tokenizer(), [USER], "Open at 10.")
    assert student_layout(query, "system") == (query.before, query.after)
    assert student_layout(query, "prefix") == ([], query.plain)
    assert cut_ids(query, 4) == query.before + query.context[:4] + query.after
    with pytest.raises(ValueError, match="placement must be one of system, prefix: got 'middle'"):
        student_layout(query, "middle")


def test_an_answer_of_the_data_ends_with_the_end_token():
    tokenizer = make_tokenizer()
    ids = tokenize_answer(tokenizer, "At 10.")
    assert tokenizer.decode(ids) == "At 10.<|end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"start": "{{ messages[0]['content'] }}"}, "exactly once"),
        ({"start": "{{ raise_exception('never') }}"}, r"roles: user\)"),
    ],
    ids=["twice", "refused"],
)
def test_a_template_without_a_place_for_the_context_is_named(template, message):
    with pytest.raises(ValueError, match=rf"data\.jsonl:7: the chat template .*{message}"):
        tokenize_query(with_template(**template), [USER], "Open at 10.", source="data.jsonl:7")
