"""What the cache gives is what the teacher gives, whoever was killed, and only then."""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
import shutil

import pytest
import torch
from toy import CHAT_TEMPLATE, make_model, make_tokenizer
from toy_cache import NUM_SHARDS, CachedToy, bits, contents, shards

from softprompt_fast.teacher import facts
from softprompt_fast.teacher.answers import SketchOptions
from softprompt_fast.teacher.cache import FACTS_FILE, TeacherCache

FORK = multiprocessing.get_context("fork")
FORMS = {
    "ids": dict(record_hidden=False, sketch=None),
    "hidden": dict(record_hidden=True, sketch=None),
    "sketch": dict(record_hidden=False),
    "all": dict(record_hidden=True, sketch=SketchOptions(top_k=3, temperature=2.0)),
}


def expected(toy) -> list:
    return bits(toy.teacher.answer(toy.queries, toy.given, **toy.form))


# What it gives


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("cohere", torch.float32)],
    ids=str,
)
def test_answers_are_the_teachers_to_the_bit(tmp_path, architecture, dtype, form):
    toy = CachedToy(model=make_model(architecture, dtype=dtype), **FORMS[form])
    answers = expected(toy)
    assert bits(toy.answers(tmp_path)) == answers
    assert bits(toy.answers(tmp_path)) == answers


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_shards_have_the_batches_of_the_whole(tmp_path, batch_size):
    toy = CachedToy(batch_size=batch_size)
    assert bits(toy.answers(tmp_path)) == expected(toy)
    assert len(shards(tmp_path)) == len(toy.teacher.shards(len(toy.queries)))


def test_a_second_run_computes_nothing(toy, directory):
    calls = []

    def count(module, args, output):  # one token is read to see what the model holds
        calls.extend([1] * (output.last_hidden_state.shape[1] > 1))

    hook = toy.model.get_decoder().register_forward_hook(count)
    toy.answers(directory)
    assert not calls
    shards(directory)[0].unlink()
    toy.answers(directory)
    assert calls
    hook.remove()


@pytest.mark.parametrize("full", [True, False], ids=["read", "computed"])
def test_answers_are_mapped_into_memory(toy, directory, tmp_path, full):
    directory = directory if full else tmp_path / "new"
    answer = toy.answers(directory)[0]
    address = answer.hidden.data_ptr()
    with open("/proc/self/maps") as file:
        lines = [line.split(maxsplit=5) for line in file]
    (name,) = (
        line[5].strip()
        for line in lines
        if int(line[0].split("-")[0], 16) <= address < int(line[0].split("-")[1], 16)
    )
    assert name in map(str, shards(directory))


def test_a_change_of_an_answer_does_not_reach_the_file(toy, directory, filled):
    toy.answers(directory)[0].hidden.zero_()
    assert contents(directory) == contents(filled)


def test_other_data_are_other_shards(toy, directory, filled):
    other = CachedToy(questions=[*toy.questions[:-1], "Later?"])
    assert bits(other.answers(directory)) == expected(other)
    assert contents(filled).items() < contents(directory).items()
    assert len(shards(directory)) == NUM_SHARDS + 1  # the question was in the second shard


# Whose it is


def retrained(**changes):
    return dict(model=make_model(**changes))


def another_config():
    model = make_model()
    model.config.rms_norm_eps = 1e-3
    return dict(model=model)


def another_tokenizer(**changes):
    tokenizer = copy.deepcopy(make_tokenizer())
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    if not changes:
        tokenizer.add_tokens(["Spanner"])
    return dict(tokenizer=tokenizer)


STALE = {
    "weights": lambda: retrained(seed=1),
    "dtype weights": lambda: retrained(dtype=torch.bfloat16),
    "config": another_config,
    "tokenizer": another_tokenizer,
    "chat_template": lambda: another_tokenizer(chat_template=f"{CHAT_TEMPLATE} "),
    "chat_template_kwargs": lambda: another_tokenizer(chat_template_kwargs={"a": 1}),
    "chat_template_date": lambda: another_tokenizer(chat_template_date="2026-11-27"),
    "context": lambda: dict(context="Closed for good."),
    "max_new_tokens": lambda: dict(max_new_tokens=4),
    "do_sample": lambda: dict(do_sample=True),
    "teacher_batch_size": lambda: dict(batch_size=2),
    "teacher_store": lambda: dict(record_hidden=False),
    "teacher_store teacher_top_k temperature": lambda: dict(sketch=None),
    "teacher_top_k": lambda: dict(sketch=SketchOptions(top_k=5)),
    "temperature": lambda: dict(sketch=SketchOptions(top_k=4, temperature=2.0)),
}


def stale(toy, directory) -> tuple[str, list[str]]:
    """The file that another teacher made, and the names of the facts that differ."""
    with pytest.raises(ValueError, match=rf"^teacher_cache {directory} is stale: ") as error:
        toy.answers(directory)
    (file, differing), *_ = re.findall(
        r"stale: (\S+) was made with (.*)\. Choose", str(error.value)
    )
    assert all(re.fullmatch(r"\w+: .+ there, .+ now", text) for text in differing.split("; "))
    return file, [text.split(":")[0] for text in differing.split("; ")]


@pytest.mark.parametrize("names", STALE)
def test_a_stale_cache_is_refused_by_what_differs(directory, filled, names):
    assert stale(CachedToy(**STALE[names]()), directory) == (FACTS_FILE, names.split())
    assert contents(directory) == contents(filled)


def test_another_format_is_stale(toy, directory, monkeypatch):
    monkeypatch.setattr(facts, "FORMAT_VERSION", facts.FORMAT_VERSION + 1)
    assert stale(toy, directory) == (FACTS_FILE, ["format_version"])


def test_a_shard_of_another_teacher_is_refused(toy, directory, tmp_path):
    CachedToy(**retrained(seed=1)).answers(tmp_path / "other")
    shard = shards(tmp_path / "other")[0]
    shutil.copy(shard, directory)
    assert stale(toy, directory) == (shard.name, ["weights"])


def test_how_the_tokenizer_was_last_called_is_no_fact(toy, directory, computed):
    tokenizer = copy.deepcopy(make_tokenizer())
    before = tokenizer.backend_tokenizer.to_str()
    tokenizer("text", truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.to_str() != before
    CachedToy(tokenizer=tokenizer).answers(directory)
    assert computed() == 0


# Where it is


def test_a_directory_that_is_something_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=f"{tmp_path} is occupied: it holds 'thesis.tex' and no"):
        TeacherCache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    where = tmp_path / "file/cache"
    with pytest.raises(OSError, match=f"cannot write to teacher_cache {where}: Not a directory"):
        TeacherCache(where)


@pytest.mark.parametrize("kind", ["lock", "tmp"])
@pytest.mark.parametrize("of", ["facts", "shard"])
def test_a_link_leads_nowhere(toy, filled, directory, tmp_path, of, kind):
    path = directory / FACTS_FILE if of == "facts" else shards(directory)[0]
    path.unlink()
    (tmp_path / "thesis.tex").write_text("precious")
    name = "lock" if kind == "lock" else f"{os.getpid()}.tmp"
    link = directory / f".{path.name}.{name}"
    link.symlink_to(tmp_path / "thesis.tex")
    if kind == "lock":
        with pytest.raises(OSError, match=str(link)):
            toy.answers(directory)
    else:
        toy.answers(directory)
        assert contents(directory) == contents(filled)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
