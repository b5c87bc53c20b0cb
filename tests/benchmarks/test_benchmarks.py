"""The benchmarks time only what is right, leave no one out in silence, and judge themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pkgutil
import re
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from cases import DTYPES, MAX_PRODUCT_SECONDS, Shape
from fresh_process import StepCost, in_fresh_process
from losses import measure, problems
from losses.peers import OURS, PEERS, Peer
from losses.problems import PROBLEMS, BarePasses, exact, gradient, tensors_of
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
    return contextlib.nullcontext(lambda: StepCost(peak_mib=0.0, seconds=0.1))


each_dtype = pytest.mark.parametrize("dtype", DTYPES)


@each_dtype
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ["softprompt_fast", "PyTorch"])
def test_the_right_gradient_is_timed(monkeypatch, name, problem, dtype):
    """PyTorch rounds its logits to the dtype: a bound that refuses that would refuse most peers."""
    monkeypatch.setattr(measure, "in_fresh_process", nowhere)
    clock = Clock()
    with pytest.raises(InterruptedError):
        measure.measure(clock, SHAPE, problem, name, dtype)
    assert clock.timed


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.15), ("float32", 0.001)])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_gradient_that_is_wrong_is_not_timed(monkeypatch, problem, dtype, error):
    """By a thousandth in fp32, by more than rounded logits explain in bf16."""

    def wrong(tensors):
        loss = OURS.losses[problem](tensors)
        return lambda t: (1 + error) * loss(t)

    monkeypatch.setattr(measure, "in_fresh_process", nowhere)
    monkeypatch.setitem(PEERS, "wrong", Peer(losses={problem: wrong}))
    clock = Clock()
    with pytest.raises(AssertionError, match=f"wrong gradient: relative error {str(error)[:4]}"):
        measure.measure(clock, SHAPE, problem, "wrong", dtype)
    assert not clock.timed


def test_ours_may_not_round_its_logits(monkeypatch):
    """In bf16 it is held to its contract, where a peer's error is only shown."""
    rounds_logits = PEERS["PyTorch"].losses["KL"]
    monkeypatch.setattr(measure, "in_fresh_process", nowhere)
    monkeypatch.setitem(OURS.losses, "KL", rounds_logits)
    with pytest.raises(AssertionError, match="wrong gradient"):
        measure.measure(Clock(), SHAPE, "KL", "softprompt_fast", "bfloat16")


@pytest.mark.parametrize("emulated", [False, True])
@each_dtype
def test_bare_passes_are_the_products(monkeypatch, dtype, emulated):
    """Whether in their dtype at once, or of a block of the head after the other in fp32."""
    monkeypatch.setattr(problems, "emulates", lambda dtype: emulated and dtype == torch.bfloat16)
    monkeypatch.setattr(BarePasses, "BLOCK", 300)  # the last block is not whole
    dtype = getattr(torch, dtype)
    tensors = tensors_of(SHAPE, dtype)
    bare = BarePasses(tensors)
    bare()
    hidden, weight = tensors.hidden.detach().double(), tensors.weight.double()
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(bare.logits.double(), hidden @ weight.T, **near)
    assert bare.dz.dtype == dtype
    product = bare.dz.double() @ weight
    torch.testing.assert_close(bare.dh.double(), product, rtol=2e-2, atol=2e-2 * weight.norm())


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


@each_dtype
@pytest.mark.parametrize("token", [0, SHAPE.T - 1])
def test_one_wrong_token_is_seen(token, dtype):
    dtype = getattr(torch, dtype)
    tensors, truth = tensors_of(SHAPE, dtype), exact("KL", SHAPE, dtype)
    found = gradient(OURS.losses["KL"](tensors), tensors)
    truth.check(found, truth.bounds.contract)
    found[token] = 0
    with pytest.raises(AssertionError, match="wrong gradient"):
        truth.check(found, truth.bounds.rounded_logits)


def test_who_cannot_run_says_why():
    absent = Peer(package="no_such_package", losses={})
    assert absent.reason() == "no_such_package is not installed"
    assert Peer(needs_gpu="kernels", losses={}).reason() in (None, "needs a GPU: kernels")
    huge = dataclasses.replace(SHAPE, T=10**6, V=10**6)
    assert "GiB of memory" in measure.refusal(huge, "PyTorch", "bfloat16")
    assert measure.refusal(huge, "softprompt_fast", "bfloat16") is None
    unsloth = PEERS["Unsloth-zoo fused linear"]
    if find_spec("unsloth_zoo") is None:
        assert "transformers<=" in unsloth.reason()
    elif find_spec("unsloth") is None:
        assert "without unsloth" in unsloth.reason()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies bf16")
def test_who_waits_for_emulated_products_is_not_measured_for_minutes(monkeypatch):
    waits, has_its_own = "PyTorch", "softprompt_fast"
    for duration, refused in ((MAX_PRODUCT_SECONDS / 2, False), (MAX_PRODUCT_SECONDS * 5, True)):
        monkeypatch.setattr(measure, "emulated_product_seconds", lambda *_, d=duration: d)
        reason = measure.refusal(SHAPE, waits, "bfloat16")
        assert (reason is not None) == refused
        assert not refused or re.match(f"tiny, T=24 in bf16: .* {duration:.0f} s", reason)
        assert measure.refusal(SHAPE, has_its_own, "bfloat16") is None


def row(implementation: str, milliseconds: float, peak_mib: float, **more):
    shape = {"dtype": "bfloat16", "model": "m", "T": 8, "D": 4, "V": 16, "loss": "KL"}
    figures = {"milliseconds": milliseconds, "peak_mib": peak_mib}
    return {**shape, "implementation": implementation, **figures, **more}


def test_the_verdict_names_whoever_is_faster_or_smaller():
    ours = row("softprompt_fast", 10, 10)
    assert tables.verdict([ours, row("a", 11, 11)]) == []
    faster, smaller = tables.verdict([ours, row("a", 9, 11), row("b", 11, 9)])
    assert "a is faster, 9 ms to our 10" in faster
    assert "b is smaller, 9 MiB to our 10" in smaller
    other = {"dtype": "float32"}
    (slower,) = tables.verdict(
        [ours, row("softprompt_fast", 30, 1, **other), row("a", 20, 9, **other)]
    )
    assert slower.startswith("fp32, m (4 × 16), T=8, KL: a is faster")
    assert tables.verdict([ours, {**row("c", 0, 0), "reason": "needs a GPU"}]) == []


def test_the_front_table_names_the_fastest_other_implementation():
    rows = [row("softprompt_fast", 10, 1), row("PyTorch", 30, 9), row("a", 20, 5), row("b", 25, 2)]
    absent = {**row("c", 0, 0), "reason": "needs a GPU"}
    assert tables.front_table([*rows, absent]).rows == [
        ["bf16", "8", "KL", "10 ms, 1 MiB", "30 ms, 9 MiB", "20 ms, 5 MiB (a)"]
    ]


def test_the_front_is_where_pytorch_was_measured():
    few = [row(name, 1, 1, T=8) for name in ("softprompt_fast", "PyTorch")]
    many = [row("softprompt_fast", 1, 1, T=64), row("PyTorch", 0, 0, T=64, reason="slow")]
    wide = [{**line, "T": 64, "dtype": "float32"} for line in few]
    assert tables.front_rows([*few, *many, *wide], "bfloat16") == few
    assert tables.front_rows([*few, *many, *wide], "float32") == wide


def test_a_time_of_one_round_has_no_spread():
    figures = dict(forward_milliseconds=1, passes=2, ratio=1, gradient_error=2e-3, spread=0.0)
    once, often = (row("a", 1, 1, rounds=rounds, **figures) for rounds in (1, 3))
    found = [
        dict(zip(t.columns, t.rows[0], strict=True))
        for t in map(tables.loss_table, ([once], [often]))
    ]
    assert [cells["± spread"] for cells in found] == ["–", "0%"]
    assert found[0]["dtype"] == "bf16"


@pytest.mark.parametrize("converted", [False, True])
def test_what_a_pass_in_bf16_was_is_said(converted):
    assert (
        "no instructions for bf16"
        in tables.rounding_line([row("a", 1, 1, bare_converted=converted)])
    ) == converted


def test_the_missing_are_listed_once_with_every_loss():
    rows = [{**row("a", 0, 0), "reason": "needs a GPU", "loss": loss} for loss in ("NLL", "KL")]
    assert tables.missing([*rows, *rows]) == ["a (NLL; KL): needs a GPU"]
    also = {**row("b", 0, 0), "reason": "needs a GPU"}
    assert tables.missing([*rows, also]) == ["a (NLL; KL), b (KL): needs a GPU"]


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
