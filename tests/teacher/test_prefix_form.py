"""A teacher that holds its context in another form says what that costs, and answers as before."""

from __future__ import annotations

import re

import pytest
import torch
from toy import PADDING_SENSITIVE, make_model
from toy_cache import CachedToy
from toy_run import train_flags
from toy_teacher import given_answers, make_queries, make_teacher

import softprompt_fast as spf
from softprompt_fast.base_model.output_head import OutputHead
from softprompt_fast.cli.main import main
from softprompt_fast.synthesis.options import SynthesizeOptions, decisive_options
from softprompt_fast.teacher import teacher as teacher_module
from softprompt_fast.training.arguments import FREE_OPTIONS

LINE = re.compile(
    r"Keys and values of the context in 8 bits: KL\((\w+) \|\| int8\) is (\S+) nats a token behind "
    r"(?:the first (\d+) tokens of )?the context \((\d+) answer tokens of (\d+) queries\)\n"
)


def kl_between(model, own, held) -> float:
    head = OutputHead.from_model(model)
    states = (torch.cat([answer.hidden for answer in answers]) for answers in (own, held))
    log_p, log_q = (head.logits(hidden).double().log_softmax(-1) for hidden in states)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_what_8_bits_cost_is_printed_once(capsys):
    model = make_model()
    queries, given = make_queries()[:4], given_answers()[:4]
    own = make_teacher(model).answer(queries, given, record_hidden=True)
    teacher = make_teacher(model, prefix_dtype="int8")
    assert not capsys.readouterr().err
    held = teacher.answer(queries, given, record_hidden=True)
    teacher.answer(make_queries(context="Nobody is here now."), record_hidden=True)
    ((dtype, kl, first, tokens, number),) = LINE.findall(capsys.readouterr().err)
    expected = kl_between(model, own, held)
    assert 0 < expected < 0.05
    assert float(kl) == pytest.approx(expected, rel=0.06, abs=1e-6)  # two digits
    assert (dtype, first, number) == ("float32", "", "4")
    assert int(tokens) == sum(map(len, given))


def test_it_is_measured_on_so_much(capsys, monkeypatch):
    """The time that it takes does not grow with the context, the queries or their answers."""
    limits = {"MEASURED_PREFIX": 20, "MEASURED_QUERIES": 2, "MEASURED_ANSWER": 3}
    for name, value in limits.items():
        monkeypatch.setattr(teacher_module, name, value)
    make_teacher(make_model(), prefix_dtype="int8").answer(make_queries())
    ((_, _, first, tokens, number),) = LINE.findall(capsys.readouterr().err)
    assert (first, number) == ("20", "2")
    assert int(tokens) <= 6


def test_other_teachers_print_nothing(capsys):
    for options in ({}, {"prefix_device": "cpu"}):
        make_teacher(make_model(), **options).answer(make_queries(), record_hidden=True)
    assert not LINE.search(capsys.readouterr().err)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_on_the_host_nothing_changes(architecture):
    model = make_model(architecture)
    own, held = (
        make_teacher(model, **options).answer(make_queries(), record_hidden=True)
        for options in ({}, {"prefix_device": "cpu"})
    )
    assert [answer.ids for answer in held] == [answer.ids for answer in own]
    assert all(torch.equal(a.hidden, b.hidden) for a, b in zip(held, own, strict=True))


@pytest.mark.parametrize("options", [{"prefix_dtype": "int8"}, {"prefix_device": "cpu"}], ids=str)
@pytest.mark.parametrize("architecture", ["falcon_h1", *PADDING_SENSITIVE])
def test_a_model_that_does_not_share_its_context_refuses(architecture, options):
    name = type(make_model(architecture)).__name__
    with pytest.raises(ValueError, match=rf"prefix_dtype=.*: {name} does not share one context"):
        make_teacher(make_model(architecture), **options)


def test_keys_that_turn_are_read_anew():
    """A query that passes LongRoPE's switch has a context in the model's dtype; one beside it has a
    copy of the one in 8 bits."""
    model = make_model("longrope")
    queries, given = make_queries(["x" * 60, "Hi"]), given_answers()[:2]
    own, held = (
        make_teacher(model, **options).answer(queries, given, record_hidden=True)
        for options in ({}, {"prefix_dtype": "int8"})
    )
    assert torch.equal(own[0].hidden, held[0].hidden)
    assert 0 < (held[1].hidden - own[1].hidden).norm() < 0.05 * own[1].hidden.norm()


def test_a_cache_knows_8_bits_and_nothing_of_the_rest():
    toy = CachedToy()
    before = toy.facts
    assert "prefix_dtype" not in before
    toy.teacher = make_teacher(toy.model, prefix_device="cpu", batch_size=1, max_new_tokens=3)
    assert toy.facts == before
    toy.teacher = make_teacher(toy.model, prefix_dtype="int8", batch_size=1, max_new_tokens=3)
    assert toy.facts == {**before, "prefix_dtype": "int8"}


def test_the_commands_hand_it_on(tmp_path, capsys):
    flags = train_flags(tmp_path, max_steps=1, prefix_dtype="int8", prefix_device="cpu")
    assert main(flags) == 0
    assert len(LINE.findall(capsys.readouterr().err)) == 1
    evaluate = ["eval", f"--prompt_dir={tmp_path / 'run'}", "--num_samples=0"]
    assert main([*evaluate, "--prefix_dtype=int8"]) == 0
    assert len(LINE.findall(capsys.readouterr().err)) == 1
    assert main(evaluate) == 0
    assert not LINE.findall(capsys.readouterr().err)
    assert main([*flags, "--prefix_dtype=auto"]) != 0  # another run
    assert "prefix_dtype: 'int8' there" in capsys.readouterr().err


def test_a_synthesis_goes_on_where_the_option_was_not_known():
    options = dict(model="m", context_file="c", output_dir="o")
    known = decisive_options(SynthesizeOptions(**options), "")
    assert "prefix_dtype" not in known and "prefix_device" not in known
    other = decisive_options(SynthesizeOptions(**options, prefix_dtype="int8"), "")
    assert other == {**known, "prefix_dtype": "int8"}
    assert "prefix_device" in FREE_OPTIONS


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model(real_model, capsys):
    """8 bits cost about as much as another order of sums does in bf16, and no answer."""
    model, tokenizer = spf.load_model(real_model, dtype="float32", device="cpu")
    records = spf.read_jsonl("examples/handbook_heldout.jsonl")[:4]
    with open("examples/handbook.md") as file:
        context = file.read()
    own, held = (
        spf.make_examples(
            spf.Teacher(model, tokenizer, max_new_tokens=16, show_progress=False, **options),
            tokenizer,
            records,
            context,
            record_hidden=True,
        )
        for options in ({}, {"prefix_dtype": "int8"})
    )
    ((_, kl, _, _, _),) = LINE.findall(capsys.readouterr().err)
    assert 0 < float(kl) < 3e-4
    same = [a.answer.ids == b.answer.ids for a, b in zip(own, held, strict=True)]
    assert sum(same) >= 3
