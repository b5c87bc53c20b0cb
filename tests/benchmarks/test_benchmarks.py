"""The benchmarks time only what is right, leave no one out in silence, and judge themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pkgutil
from concurrent.futures.process import BrokenProcessPool
from unittest import mock

import pytest
from cases import Shape
from fresh_process import in_fresh_process
from losses import measure
from losses.peers import OURS, PEERS, Peer
from losses.problems import PROBLEMS, exact, gradient, tensors_of
from render import tables

import softprompt_fast as spf

SHAPE = Shape(model="tiny", T=24, D=32, V=1003)


class Clock:
    """Stands in for pytest-benchmark's fixture: has anything been timed?"""

    timed = False

    def pedantic(self, *_args, **_options):
        self.timed = True
        raise InterruptedError


def nowhere(*_arguments):
    """Stands in for the process that measures memory."""
    return contextlib.nullcontext(lambda: 0.0)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ["softprompt_fast", "PyTorch"])
def test_the_right_gradient_is_timed(monkeypatch, name, problem):
    monkeypatch.setattr(measure, "in_fresh_process", nowhere)
    clock = Clock()
    with pytest.raises(InterruptedError):
        measure.measure(clock, SHAPE, problem, name)
    assert clock.timed


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_gradient_that_is_wrong_by_a_thousandth_is_not_timed(monkeypatch, problem):
    def wrong(tensors):
        loss = OURS.losses[problem](tensors)
        return lambda t: 1.001 * loss(t)

    monkeypatch.setattr(measure, "in_fresh_process", nowhere)
    monkeypatch.setitem(PEERS, "wrong", Peer(losses={problem: wrong}))
    clock = Clock()
    with pytest.raises(AssertionError, match="wrong gradient: relative error 0.001"):
        measure.measure(clock, SHAPE, problem, "wrong")
    assert not clock.timed


@pytest.fixture
def environment():
    """Of the test process: as it was, when the test ends."""
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.usefixtures("environment")
def test_memory_is_measured_of_the_same_package():
    """Of the installed one, not of sources without an extension in the working directory."""
    with in_fresh_process(pkgutil.resolve_name, "softprompt_fast:__file__") as wait:
        assert wait() == spf.__file__


@pytest.mark.usefixtures("environment")
def test_a_process_that_dies_is_an_error():
    with in_fresh_process(os.abort) as wait, pytest.raises(BrokenProcessPool):
        wait()


@pytest.mark.parametrize("token", [0, SHAPE.T - 1])
def test_one_wrong_token_is_seen(token):
    found = gradient(OURS.losses["KL"](tensors_of(SHAPE)), tensors_of(SHAPE))
    exact("KL", SHAPE).check(found)
    found[token] = 0
    with pytest.raises(AssertionError, match="wrong gradient"):
        exact("KL", SHAPE).check(found)


def test_who_cannot_run_says_why():
    absent = Peer(package="no_such_package", losses={})
    assert absent.reason() == "no_such_package is not installed"
    assert Peer(needs_gpu="kernels", losses={}).reason() in (None, "needs a GPU: kernels")
    huge = dataclasses.replace(SHAPE, T=10**6, V=10**6)
    assert "GiB of memory" in measure.refusal(huge, "PyTorch")
    assert measure.refusal(huge, "softprompt_fast") is None


def row(implementation: str, milliseconds: float, peak_mib: float, **more):
    shape = {"model": "m", "T": 8, "D": 4, "V": 16, "loss": "KL"}
    return {**shape, "implementation": implementation, "peak_mib": peak_mib, **more} | {
        "milliseconds": milliseconds
    }


def test_the_verdict_names_whoever_is_faster_or_smaller():
    ours = row("softprompt_fast", 10, 10)
    assert tables.verdict([ours, row("a", 11, 11)]) == []
    faster, smaller = tables.verdict([ours, row("a", 9, 11), row("b", 11, 9)])
    assert "a is faster, 9 ms to our 10" in faster
    assert "b is smaller, 9 MiB to our 10" in smaller
    assert tables.verdict([ours, {**row("c", 0, 0), "reason": "needs a GPU"}]) == []


def test_the_front_table_names_the_fastest_other_implementation():
    rows = [row("softprompt_fast", 10, 1), row("PyTorch", 30, 9), row("a", 20, 5), row("b", 25, 2)]
    absent = {**row("c", 0, 0), "reason": "needs a GPU"}
    assert tables.front_table([*rows, absent]).rows == [
        ["KL", "10 ms, 1 MiB", "30 ms, 9 MiB", "20 ms, 5 MiB (a)"]
    ]


def test_the_missing_are_listed_once_with_every_loss():
    rows = [{**row("a", 0, 0), "reason": "needs a GPU", "loss": loss} for loss in ("NLL", "KL")]
    assert tables.missing([*rows, *rows]) == ["a (NLL; KL): needs a GPU"]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_exponent_is_that_of_a_power_law(power):
    points = [(x, 3 * x**power) for x in (64, 256, 1024)]
    assert tables.exponent(points) == pytest.approx(power, abs=1e-9)


def test_a_table_that_is_split_for_a_screen_loses_no_row():
    rows = [[head, T, loss, "1"] for head in "ab" for T in "12" for loss in ("NLL", "KL")]
    table = tables.Table("all", ["head", "T", "loss", "ms"], rows, texts=3)
    parts = table.split(2)
    assert [part.title for part in parts] == [f"head: {h}, T: {T}" for h in "ab" for T in "12"]
    assert [cells for part in parts for cells in part.rows] == [cells[2:] for cells in rows]
    assert {(*part.columns, part.texts) for part in parts} == {("loss", "ms", 1)}
