"""The command line trains alike, whatever is kept of the teacher and wherever."""

from __future__ import annotations

import json

import pytest
import torch
from toy import make_model
from toy_run import train_flags

from softprompt_fast.cli.main import main
from softprompt_fast.teacher.teacher import Teacher


def prompt(run) -> bytes:
    return (run / "adapter_model.safetensors").read_bytes()


def losses(run) -> list[float]:
    state = json.loads((run / "checkpoint-6/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def refused(capsys, arguments) -> str:
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize(
    "store", ["sketch", *(pytest.param(s, marks=pytest.mark.slow) for s in ("hidden", "online"))]
)
def test_a_cache_changes_no_bit(tmp_path, monkeypatch, store):
    cached = dict(teacher_store=store, teacher_cache=tmp_path / "cache", eval_strategy="epoch")
    plain = {**cached, "teacher_cache": None}
    for name, options in (("plain", plain), ("first", cached), ("second", cached)):
        if name == "second":
            monkeypatch.setattr(Teacher, "_write", None)  # nothing is left to answer
        assert main(train_flags(tmp_path, name, **options)) == 0
    assert prompt(tmp_path / "plain") == prompt(tmp_path / "first") == prompt(tmp_path / "second")


def test_all_stores_train_to_the_same_losses(tmp_path):
    for store in ("sketch", "hidden", "online"):
        assert main(train_flags(tmp_path, store, teacher_store=store, logging_steps=1)) == 0
    expected = losses(tmp_path / "hidden")
    assert len(expected) == 6
    for store in ("sketch", "online"):
        torch.testing.assert_close(losses(tmp_path / store), expected, rtol=1e-4, atol=1e-6)


def test_a_sketch_for_another_divergence_is_refused_before_the_model_loads(tmp_path, capsys):
    error = refused(
        capsys, train_flags(tmp_path, model="./no/such", teacher_store="sketch", beta=1)
    )
    assert "teacher_store sketch cannot be used: sketches are exact for forward KL alone" in error
    assert "beta is 1. Use --teacher_store=hidden" in error


def test_a_softcap_falls_back_to_hidden_states(tmp_path, capsys):
    flags = train_flags(tmp_path, max_steps=1)
    make_model("gemma2").save_pretrained(tmp_path / "model")
    why = "sketches are exact for a linear head, and this model caps its logits at 5.0"
    assert why in refused(capsys, [*flags, "--teacher_store=sketch"])
    assert main(flags) == 0
    assert f"Of the teacher is kept: its answers and hidden states ({why})" in (
        capsys.readouterr().err
    )


def test_a_stale_cache_ends_a_run_before_it_begins(tmp_path, capsys):
    cache = dict(teacher_cache=tmp_path / "cache")
    assert main(train_flags(tmp_path, max_steps=1, **cache)) == 0
    error = refused(capsys, train_flags(tmp_path, "other", max_new_tokens=5, **cache))
    assert f"error: teacher_cache {tmp_path / 'cache'} is stale: teacher_cache.json" in error
    assert "was made with max_new_tokens: 7 there, 5 now. Choose another directory" in error
    assert not (tmp_path / "other/run.json").exists()


def occupy(path):
    path.mkdir()
    (path / "thesis.tex").touch()


@pytest.mark.parametrize(
    ("name", "prepare", "message"),
    [
        ("run", None, "lies in output_dir"),
        ("run/cache", None, "lies in output_dir"),
        ("other/../run/cache", None, "lies in output_dir"),
        ("cache", occupy, "is occupied: it holds 'thesis.tex' and no teacher_cache.json"),
        ("cache", lambda path: path.touch(), "cannot write to teacher_cache"),
    ],
    ids=["output", "inside", "by-another-name", "occupied", "unwritable"],
)
def test_a_wrong_directory_is_said_before_the_model_loads(tmp_path, capsys, name, prepare, message):
    path = tmp_path / name
    flags = train_flags(tmp_path, model="./no/such", teacher_cache=path)
    if prepare is not None:
        prepare(path)
    error = refused(capsys, flags)
    assert message in error
    assert f"teacher_cache {path}" in error
