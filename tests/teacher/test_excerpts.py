"""Contexts that the model cannot read whole: what the teacher reads, and that all else holds."""

from __future__ import annotations

import pytest
from toy import make_model, make_tokenizer
from toy_teacher import NEW_TOKENS

from softprompt_fast.data.queries import teacher_ids
from softprompt_fast.data.records import Record
from softprompt_fast.teacher.examples import make_examples
from softprompt_fast.teacher.teacher import Teacher

POSITIONS = 512
NAMES = [f"{first}{second}nt" for first in "bdfgklmp" for second in ("a", "e", "i", "o", "u")]
RULES = [f"The {name} is number {place}. It rains." for place, name in enumerate(NAMES)]
CONTEXT = "\n\n".join(RULES)  # three times what the model reads


def make_teacher(**options):
    options = {"max_new_tokens": NEW_TOKENS, "show_progress": False, **options}
    return Teacher(make_model(), make_tokenizer(), **options)


def record(question, *, line=1, **options):
    messages = [{"role": "user", "content": question}]
    options = {"completion": None, "context": None, "source": f"q:{line}", **options}
    return Record(messages=messages, **options)


def read(examples):
    return [make_tokenizer().decode(example.query.context) for example in examples]


def span(rule):
    start = CONTEXT.index(rule)
    return start, start + len(rule)


@pytest.mark.parametrize("is_marked", [True, False])
def test_each_query_is_answered_from_what_it_is_about(is_marked, capsys):
    teacher = make_teacher()
    records = [
        record(f"{name}?", line=line, context_span=span(rule) if is_marked else None)
        for line, (name, rule) in enumerate(zip(NAMES, RULES, strict=True))
    ]
    examples = make_examples(teacher, make_tokenizer(), records, CONTEXT, record_hidden=True)
    for text, rule, example in zip(read(examples), RULES, examples, strict=True):
        assert rule in text and text in CONTEXT
        asked = len(teacher_ids(example.query))
        assert POSITIONS / 2 < asked <= POSITIONS - NEW_TOKENS
    assert len(set(read(examples))) <= len(RULES) / 5
    note = capsys.readouterr().err
    assert "the context has 1," in note and "excerpts of at most" in note
    make_examples(teacher, make_tokenizer(), records, CONTEXT, record_hidden=False)
    assert "excerpts" not in capsys.readouterr().err


def test_the_span_goes_before_the_words():
    about = record(f"{NAMES[2]}?", context_span=span(RULES[-1]))
    (example,) = make_examples(
        make_teacher(), make_tokenizer(), [about], CONTEXT, record_hidden=False
    )
    (text,) = read([example])
    assert RULES[-1] in text and NAMES[2] not in text


def test_answers_stand_where_their_queries_stand():
    """Though those that share an excerpt are answered together, in whatever order they come."""
    teacher, records = make_teacher(batch_size=2), [record(f"{name}?") for name in NAMES]
    together = make_examples(teacher, make_tokenizer(), records, CONTEXT, record_hidden=False)
    for one, example in zip(records, together, strict=True):
        (alone,) = make_examples(teacher, make_tokenizer(), [one], CONTEXT, record_hidden=False)
        assert example.query == alone.query
        assert example.answer.ids == alone.answer.ids


def test_what_fits_is_read_whole(capsys):
    context = CONTEXT[:400]
    (example,) = make_examples(
        make_teacher(), make_tokenizer(), [record(f"{NAMES[3]}?")], context, record_hidden=False
    )
    assert read([example]) == [context.strip()]
    assert "excerpts" not in capsys.readouterr().err


def test_less_is_read_where_that_is_asked_for():
    teacher = make_teacher(max_context_tokens=100)
    (example,) = make_examples(
        teacher, make_tokenizer(), [record(f"{NAMES[3]}?")], CONTEXT[:600], record_hidden=False
    )
    (text,) = read([example])
    assert NAMES[3] in text and len(text) <= 100
    with pytest.raises(ValueError, match="max_context_tokens must be >= 16: got 3"):
        make_teacher(max_context_tokens=3)


def test_a_context_of_a_line_is_cut_too():
    other = CONTEXT.replace("number", "place")
    records = [
        record(f"{NAMES[-1]}?"),
        record(f"{NAMES[-1]}?", context=other),
        record(f"{NAMES[-1]}?", context="Nobody."),
    ]
    examples = make_examples(
        make_teacher(), make_tokenizer(), records, CONTEXT, record_hidden=False
    )
    one, two, three = read(examples)
    assert f"{NAMES[-1]} is number" in one and f"{NAMES[-1]} is place" in two
    assert three == "Nobody."


def test_a_span_of_another_context_is_refused():
    wrong = record(f"{NAMES[-1]}?", line=7, context_span=(10, len(CONTEXT) + 1))
    with pytest.raises(ValueError, match=r"q:7: context_span is \[10, \d+\], and the context has"):
        make_examples(make_teacher(), make_tokenizer(), [wrong], CONTEXT, record_hidden=False)


def test_a_query_of_its_own_length_is_refused_as_ever():
    long = record("long " * 97, line=3)
    with pytest.raises(ValueError, match=r"q:3: context and query take .* 512 positions"):
        make_examples(
            make_teacher(),
            make_tokenizer(),
            [record(f"{NAMES[-1]}?"), long],
            CONTEXT,
            record_hidden=False,
        )
