"""The learning-rate range test: what it suggests, and that it leaves no trace."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from toy import make_model
from toy_run import train_flags
from toy_trainer import make_examples, make_trainer

from softprompt_fast.cli.main import main
from softprompt_fast.training import lr_finder
from softprompt_fast.training.lr_finder import Point, range_test, suggested_rate


def random_states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_the_rate_grows_evenly_and_no_trace_is_left(tmp_path):
    trainer = make_trainer(tmp_path / "run", per_device_train_batch_size=4)
    (tmp_path / "run").rmdir()
    prompt, args = trainer.model.prompt.embedding, trainer.args
    before, states = prompt.detach().clone(), random_states()
    points = range_test(trainer.model, args, trainer.train_dataset)
    assert random_states() == states
    assert torch.equal(prompt, before)
    assert prompt.grad is None
    assert not (tmp_path / "run").exists()
    assert (args.max_steps, args.learning_rate) == (6, 1e-2)

    rates = [point.learning_rate for point in points]
    assert rates == pytest.approx([10 ** (-5 + step / 10) for step in range(51)])
    # The first step, with next to no rate, changes nothing.
    assert points[0].change == points[0].loss / points[0].loss == 1.0
    # Its own suggestion learns, and more than a hundredth of it.
    rate = suggested_rate(points)
    fallen = {
        lr: make_trainer(tmp_path, model=trainer.model.base, max_steps=12, learning_rate=lr)
        for lr in (rate, rate / 100)
    }
    for each in fallen.values():
        each.train()
    losses = {lr: each.evaluate()["eval_loss"] for lr, each in fallen.items()}
    assert losses[rate] < 0.95 * losses[rate / 100]


def curve(*changes):
    """From 1e-5 on, two points a decade."""
    return [
        Point(learning_rate=10 ** (-5 + index / 2), loss=1.0, change=change)
        for index, change in enumerate(changes)
    ]


@pytest.mark.parametrize(
    ("points", "rate"),
    [
        (curve(1, 1, 0.99, 0.95, 0.9, 0.8, 0.6, 0.5, 0.4, 0.7, 2.0), 1e-2),
        (curve(1, 1, 0.99, 0.95, 0.9, 0.8, 0.6, 0.5, 0.4, 0.6, 0.3), 1e-2),
        (curve(1, 1, 0.99, 1.01, 1.2, 4.0), None),
        (curve(1, 1.5), None),
        (curve(1), None),
        ([], None),
    ],
)
def test_a_tenth_of_the_rate_of_the_least_loss_is_suggested(points, rate):
    assert suggested_rate(points) == rate


def test_the_test_ends_where_the_loss_is_too_far_above_the_least(tmp_path, monkeypatch):
    monkeypatch.setattr(lr_finder, "DIVERGED", 1.0)
    model = make_model()
    examples = make_examples(model)
    trainer = make_trainer(tmp_path, model=model, examples=examples)
    points = range_test(trainer.model, trainer.args, examples)
    changes = [point.change for point in points]
    assert 1 < len(points) < 51
    assert changes[-1] > min(changes) == changes[-2]

    for example in examples:
        example.answer.hidden[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        range_test(trainer.model, trainer.args, examples)


def test_find_lr_trains_nothing(finished, capsys, monkeypatch):
    monkeypatch.setattr(lr_finder, "FIRST", 1e-3)
    monkeypatch.setattr(lr_finder, "STEPS", 24)
    files = {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*")}
    capsys.readouterr()
    # Other options than those of the run that lies there, and nowhere at all.
    for output in ("run", "absent"):
        assert main([*train_flags(finished, output, learning_rate=0.5), "--find_lr"]) == 0
        out = capsys.readouterr().out
        assert "learning-rate range test" in out
        assert "Suggested: --learning_rate 0." in out
        assert "trained or written" in out
    assert {path: path.stat().st_mtime_ns for path in (finished / "run").rglob("*")} == files
    assert not (finished / "absent").exists()
