"""Queries that the model writes: laws of their making, and what survives a kill."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
import toy
from clock import TEMPLATE, set_day
from hypothesis import given
from hypothesis import strategies as st
from killing import Fate, in_child
from toy import make_model, make_tokenizer
from toy_run import CONTEXT, save_toy_model

from softprompt_fast.base_model.decoding import Sampling
from softprompt_fast.cli.main import main
from softprompt_fast.data.queries import tokenize_answer
from softprompt_fast.data.records import read_jsonl
from softprompt_fast.synthesis import run as synthesis_run
from softprompt_fast.synthesis.directory import JOURNAL_FILE
from softprompt_fast.synthesis.filters import (
    Distinct,
    are_same,
    clean,
    fault,
    hold_out,
    subjects,
    trigrams,
)
from softprompt_fast.synthesis.kinds import KINDS
from softprompt_fast.synthesis.plan import DRY, MOST_TEXTS, QueryPlan, Visit
from softprompt_fast.synthesis.writer import Writer, completion
from softprompt_fast.utils.owned_directory import locked

# Texts


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("What is it?", "What is it?"),
        ("What is it", ""),  # cut
        ("I am ill. It hur", "I am ill."),
        ("What is it\n", "What is it"),
        ("\n 1. What is it? It is a cat.\nWhy?\n", "What is it?"),
        ('**Question:** What "is" it? \n', 'What "is" it?'),
        ("1) Question: Where is it?\n", "Where is it?"),
        ("- “Wo ist  Ben?”\n", "Wo ist Ben?"),
        ("Q: 'Members' fees?'\n", "Members' fees?"),
        ("几点开门？在哪里？\n", "几点开门？"),
        ("Open http://a.b/c?d=e now.\n", "Open http://a.b/c?d=e now."),
        ("", ""),
        (" \n\n", ""),
        ("???\n", "???"),
    ],
)
def test_cleaning(text, query):
    assert clean(text) == query


@given(st.text(alphabet="1.)-*\"' ?!？ab:\nQ\u2028\x00é", max_size=20))
def test_any_text_is_cleaned_to_one_line_once_and_for_all(text):
    query = clean(text)
    assert "\n" not in query
    assert clean(query + "\n") == query


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("When do you open on Monday?", None),
        ("几点开门？请告诉我。", None),
        ("", "empty or cut"),
        ("???", "empty or cut"),
        ("What\x1b[31m is red?", "unreadable"),
        ("What is \ufffd there?", "unreadable"),
        ("Why?", "too short"),
        ("The members and the", "unfinished"),
        ("Ask for one fact.", "copied"),
        ("How do I water a fern on a Monday?", "about an example"),
        ("What would they like there?", "off topic"),
        ("What do members pay?", None),
        ("Do members pay or do members pay or do members pay or do members pay?", "repetitive"),
    ],
)
def test_what_is_no_query(query, problem):
    about, banned = subjects("Closed on Mondays. Membership is 40 dollars."), frozenset(["fern"])
    assert fault(query, "Now: ask for ONE fact!", about=about, banned=banned) == problem


words = st.lists(
    st.sampled_from(["when", "do", "you", "open", "on", "monday", "close", "cat"]), max_size=7
)


@given(st.lists(words.map(" ".join), max_size=30))
def test_no_two_kept_texts_are_the_same_and_each_refused_one_is_known(texts):
    distinct, kept = Distinct(), []
    for text in texts:
        known = any(are_same(trigrams(text), trigrams(other)) for other in kept)
        assert distinct.add(text) is not known
        kept += [] if known else [text]


def test_what_counts_as_the_same():
    distinct = Distinct(["What does a loan bike cost a day?"])
    assert not distinct.add("what does a loan bike cost a day")
    assert not distinct.add("What does a loan bike cost, per day?")
    assert distinct.add("What does it cost to have a brake repaired?")
    assert distinct.add("一天的费用是多少") is not distinct.add("一天的费用是多少？")


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
def test_each_group_is_held_out_in_proportion(groups, data):
    texts = [f"text {index}" for index in range(len(groups))]
    number = data.draw(st.integers(0, len(groups)))
    held_out = hold_out(groups, texts, number, 0)
    assert len(held_out) == number
    for group in set(groups):
        here = {index for index, other in enumerate(groups) if other == group}
        assert abs(len(here & held_out) - len(here) * number / len(groups)) < 1
    backwards = hold_out(groups[::-1], texts[::-1], number, 0)
    assert {texts[index] for index in held_out} == {texts[::-1][index] for index in backwards}


# Plan


def some_texts(visit: Visit, yields=lambda visit: True) -> list[str]:
    """Random words, no two texts alike, some of them not whole."""
    draw = random.Random(visit.number)
    if not yields(visit):
        return ["words without an end\n" for _ in visit.openings]
    return [
        " ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(5))
        + draw.choice([*[" Spanner?\n"] * 4, "spanner?\n", " Spanner\n"])
        for _ in visit.openings
    ]


def carry_out(plan, yields=lambda visit: True):
    while (visit := plan.next_visit()) is not None:
        assert 1 <= len(visit.openings) <= plan.batch_size
        plan.take(visit, some_texts(visit, yields))
    return plan


def make_plan(num_chunks=3, num_queries=40, batch_size=8):
    chunks = [f"Spanner {index}" for index in range(num_chunks)]
    return QueryPlan(chunks, list(KINDS), num_queries=num_queries, batch_size=batch_size, seed=0)


@pytest.mark.parametrize("num_chunks", [1, 3, 60])
@pytest.mark.parametrize("num_queries", [1, 7, 40])
def test_every_chunk_and_kind_gets_its_share(num_chunks, num_queries):
    plan = carry_out(make_plan(num_chunks, num_queries))
    assert len(plan.queries) == num_queries
    assert plan.num_texts == num_queries + plan.dropped.total()
    for names, having in ((range(num_chunks), "chunk"), (KINDS, "kind")):
        counts = [sum(getattr(q, having) == name for q in plan.queries) for name in names]
        share = num_queries / len(counts)
        assert all(abs(count - share) <= share / 4 + 1 for count in counts)


def test_what_one_cell_gave_too_much_makes_up_for_another_that_gave_too_little():
    plan = carry_out(make_plan(batch_size=16), lambda visit: visit.kind != "creative")
    assert plan.num_texts <= 15 * 9  # one visit each
    assert plan.dropped["not needed"] > 0


def test_a_chunk_that_yields_nothing_is_made_up_for():
    plan = carry_out(make_plan(), lambda visit: visit.chunk != 1)
    assert len(plan.queries) == 40
    assert {query.chunk for query in plan.queries} == {0, 2}


@pytest.mark.parametrize("num_queries", [1, 40])
def test_a_model_that_yields_nothing_is_left_alone(num_queries):
    plan = carry_out(make_plan(num_queries=num_queries), lambda visit: False)
    assert not plan.queries
    assert plan.dropped == {"unfinished": plan.num_texts}
    assert 0 < plan.num_texts <= min(MOST_TEXTS * num_queries, DRY * 15 * plan.batch_size)


# The model


@pytest.fixture(autouse=True)
def _room_for_examples(monkeypatch):
    monkeypatch.setitem(toy.SIZES, "max_position_embeddings", 4096)


@pytest.mark.parametrize("chat", [True, False])
def test_what_is_written_depends_on_the_visit_alone(chat):
    def make_writer(seed=0):
        options = {"max_query_tokens": 6, "batch_size": 4, "sampling": Sampling(temperature=0.9)}
        tokenizer = make_tokenizer(chat=chat)
        return Writer(make_model(), tokenizer, [CONTEXT], seed=seed, **options)

    one, other = (
        Visit(number=number, chunk=0, kind="question", wording=0, openings=("What", "", "When"))
        for number in (0, 1)
    )
    writer, state = make_writer(), torch.get_rng_state()
    expected = writer.write(one)
    assert expected != writer.write(other)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert make_writer().write(one) == expected
    assert make_writer(seed=1).write(one) != expected
    assert expected[0].startswith("What") and expected[2].startswith("When")


@given(st.lists(st.integers(0, toy.VOCAB - 1), min_size=1, max_size=12))
def test_a_completion_is_read_as_the_answer_that_it_is(ids):
    tokenizer = make_tokenizer()
    text = completion(tokenizer, ids, [toy.VOCAB - 1])
    if text is not None:
        assert tokenize_answer(tokenizer, text, [toy.VOCAB - 1]) == ids


def test_only_whole_answers_are_completions():
    tokenizer = make_tokenizer()
    ids = tokenizer("Yes, on Monday.")["input_ids"]
    end = tokenizer.eos_token_id
    assert completion(tokenizer, [*ids, end], [end]) == "Yes, on Monday."
    assert completion(tokenizer, ids, [end]) is None
    assert completion(tokenizer, [end], [end]) is None


# The command


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories of a toy model and of a context."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy.SIZES, "max_position_embeddings", 4096)
        save_toy_model(folder / "model")
    (folder / "context.txt").write_text(CONTEXT)
    return folder


@pytest.fixture
def flags(made, monkeypatch):
    """The command's arguments. Of the toy model's own texts, which are noise, none is a query."""
    monkeypatch.setattr(Writer, "write", lambda self, visit: some_texts(visit))

    def of(output, **changes):
        options = {
            "model": made / "model",
            "context_file": made / "context.txt",
            "output_dir": output,
            "num_queries": 11,
            "chunk_tokens": 40,
            "max_new_tokens": 3,
            "batch_size": 4,
            **changes,
        }
        return ["synthesize", *(f"--{name}={value}" for name, value in options.items())]

    return of


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_files_are_what_training_reads(flags, tmp_path, capsys):
    assert main(flags(tmp_path, num_heldout=3)) == 0
    train, heldout = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("train", "heldout"))
    assert (len(train), len(heldout)) == (8, 3)
    assert not {str(r.messages) for r in train} & {str(r.messages) for r in heldout}
    state = json.loads((tmp_path / "synthesis.json").read_text())
    assert sum(state["counts"]["kinds"].values()) == 11
    assert "".join(state["chunks"]) == CONTEXT
    said = capsys.readouterr().out
    assert "11 queries about 2 chunks: " in said and f"8 queries are in {tmp_path}/train" in said
    before = contents(tmp_path)
    assert main(flags(tmp_path, num_heldout=3)) == 0
    assert "nothing is left to write" in capsys.readouterr().out
    assert contents(tmp_path) == before
    assert set(before) == {"synthesis.json", "train.jsonl", "heldout.jsonl"}


def test_a_query_says_which_characters_of_the_context_it_is_about(flags, tmp_path):
    assert main(flags(tmp_path, num_heldout=3)) == 0
    chunks = json.loads((tmp_path / "synthesis.json").read_text())["chunks"]
    for name in ("train", "heldout"):
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        for line, record in zip(
            map(json.loads, lines), read_jsonl(tmp_path / f"{name}.jsonl"), strict=True
        ):
            start, end = record.context_span
            assert CONTEXT[start:end] == chunks[line["chunk"]]


def test_a_context_longer_than_the_model_is_written_about_all_over(flags, tmp_path, capsys):
    long = tmp_path / "long.txt"
    long.write_text("\n\n".join(f"Rule {number}: {CONTEXT}" for number in range(160)))
    assert main(flags(tmp_path / "out", context_file=long, chunk_tokens=512, num_queries=60)) == 0
    assert "each query from the one around what it asks about" in capsys.readouterr().err
    spans = [record.context_span for record in read_jsonl(tmp_path / "out/train.jsonl")]
    assert min(spans)[0] < 1000 and max(spans)[1] > 9000


def test_a_query_that_leaves_no_room_for_a_context_is_refused(flags, tmp_path, capsys):
    assert main(flags(tmp_path / "new", max_new_tokens=4090)) == 1
    assert "the answer up to 4090, but the model has 4096 positions" in capsys.readouterr().err


def test_a_run_killed_over_and_over_ends_with_the_same_files(flags, tmp_path):
    def job(directory):
        assert main(flags(directory)) == 0

    whole = in_child(job, tmp_path / "whole", Fate())
    assert not whole.error, whole.error
    kills, outcome = 0, whole
    for operation in range(6, 60, 3):
        # Each run comes further than the one before, of whose work it does the least again.
        outcome = in_child(job, tmp_path / "killed", Fate(operation=operation, share=0.5))
        assert not outcome.error, outcome.error
        if not outcome.killed:
            break
        kills += 1
    assert kills >= 5 and not outcome.killed
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.fixture
def stopped(flags, tmp_path, monkeypatch):
    """A directory in which a run was interrupted after two batches."""

    def write(self, visit):
        if visit.number == 2:
            raise KeyboardInterrupt
        return some_texts(visit)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", write)
        assert main(flags(tmp_path)) == 130
    assert (tmp_path / JOURNAL_FILE).read_bytes().count(b"\n") == 2
    return tmp_path


def test_a_run_with_other_options_is_refused_with_what_differs(flags, stopped, capsys):
    before = contents(stopped)
    assert main(flags(stopped, num_queries=12, seed=1, temperature=0.5)) == 1
    message = capsys.readouterr().err
    for difference in (
        "num_queries: 11 there, 12 now",
        "seed: 0 there, 1 now",
        "temperature: 0.7",
    ):
        assert difference in message
    assert contents(stopped) == before


def test_a_model_that_has_changed_is_refused(flags, stopped, made, tmp_path, capsys):
    changed = shutil.copytree(made / "model", stopped.with_name("model"))
    make_model(seed=1).save_pretrained(changed)
    (made / "model").rename(made / "kept")
    try:
        changed.rename(made / "model")
        assert main(flags(stopped)) == 1
    finally:
        shutil.rmtree(made / "model", ignore_errors=True)
        (made / "kept").rename(made / "model")
    assert "holds queries by another model: weights: " in capsys.readouterr().err


def test_it_goes_on_with_the_day_it_began_with(flags, made, tmp_path, monkeypatch, capsys):
    model = shutil.copytree(made / "model", tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    options = {"model": model, "chat_template_kwargs": '{"enable_thinking": false}'}
    set_day(monkeypatch, "2026-11-27")
    answers = synthesis_run.answer_queries
    assert main(flags(tmp_path / "whole", **options)) == 0

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesis_run, "answer_queries", interrupted)
    assert main(flags(tmp_path / "halted", **options)) == 130
    monkeypatch.setattr(synthesis_run, "answer_queries", answers)
    set_day(monkeypatch, "2026-11-28")
    capsys.readouterr()
    assert main(flags(tmp_path / "halted", **options)) == 0
    assert "is given 2026-11-27 from now on" in capsys.readouterr().err
    assert contents(tmp_path / "halted") == contents(tmp_path / "whole")
    assert main(flags(tmp_path / "halted", model=model)) == 1
    difference = "chat_template_kwargs: {'enable_thinking': False} there, None now"
    assert difference in capsys.readouterr().err


def test_a_damaged_journal_is_named_with_its_line(flags, stopped, capsys):
    journal = stopped / JOURNAL_FILE
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1].replace(b"?", b"!", 1))
    assert main(flags(stopped)) == 1
    assert f"{journal}:2 is damaged" in capsys.readouterr().err
    journal.write_bytes(lines[1])
    assert main(flags(stopped)) == 1
    assert f"{journal} is not of this run" in capsys.readouterr().err


def test_a_second_process_and_a_strange_directory_are_refused(flags, stopped, tmp_path, capsys):
    with locked(stopped / ".lock"):
        assert main(flags(stopped)) == 1
    assert f"output_dir {stopped} is in use" in capsys.readouterr().err
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/thesis.tex").touch()
    assert main(flags(tmp_path / "strange")) == 1
    assert "is occupied: it holds 'thesis.tex'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "strange").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": "questoin"}, "got 'questoin'; did you mean question?"),
        ({"num_queries": 0}, "num_queries must be a finite number >= 1: got 0"),
        ({"heldout": 1}, "heldout is a share below 1: got 1.0"),
        ({"heldout": "nan"}, "heldout must be a finite number >= 0: got nan"),
        (
            {"num_heldout": 11},
            "num_heldout must leave a query to train on: got 11 of",
        ),
        ({"temperature": 0}, "temperature must be a finite number >= 0.01: got 0.0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1: got 1.5"),
        ({"dtype": "int3"}, "dtype must be one of"),
    ],
)
def test_wrong_values_change_nothing(flags, tmp_path, capsys, changes, message):
    assert main(flags(tmp_path / "new", **changes)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_bad_contexts_are_named(flags, tmp_path, capsys):
    (tmp_path / "empty").write_text(" \n")
    for name, message in [
        ("missing", f"{tmp_path}/missing: No such file"),
        ("empty", f"{tmp_path}/empty: the file is empty"),
    ]:
        assert main(flags(tmp_path / "new", context_file=tmp_path / name)) == 1
        assert message in capsys.readouterr().err


def test_too_few_queries_are_said_and_none_is_an_error(flags, tmp_path, monkeypatch, capsys):
    one = ["Is the cat called Spanner?\n"]
    monkeypatch.setattr(Writer, "write", lambda self, visit: one * len(visit.openings))
    assert main(flags(tmp_path / "one", num_heldout=3)) == 0
    said = capsys.readouterr().out
    assert "No more than 1 of 11 queries were to be had" in said
    assert not (tmp_path / "one/heldout.jsonl").exists()
    monkeypatch.setattr(Writer, "write", lambda self, visit: ["\x1b["] * len(visit.openings))
    assert main(flags(tmp_path / "none")) == 1
    assert "the model wrote no query: 120 texts were dropped (120 " in capsys.readouterr().err
