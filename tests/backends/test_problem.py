"""A problem is flattened for the op and comes back as it was."""

from __future__ import annotations

import itertools

import pytest
import torch

from softprompt_fast.backends.formulas import LogitTransform
from softprompt_fast.backends.problem import (
    Head,
    HiddenTeacher,
    Problem,
    SparseTarget,
    Tail,
    flatten,
    schema,
    unflatten,
)

TRANSFORMS = (LogitTransform(), LogitTransform(softcap=30.0, temperature=2.0))


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def heads() -> list[Head]:
    biases = (None, tensor(5))
    return [Head(tensor(5, 3), b, t) for b, t in itertools.product(biases, TRANSFORMS)]


def targets() -> list[SparseTarget | None]:
    ids = torch.arange(4)
    several = SparseTarget(ids, tensor(4, 2), tensor(4, 3), 0.1)
    tail = Tail(tensor(4, 3), tensor(4), 0.5)
    return [None, SparseTarget(ids), several, several._replace(tail=tail)]


def teachers() -> list[HiddenTeacher | None]:
    return [None, HiddenTeacher(tensor(4, 3)), HiddenTeacher(tensor(4, 3), heads()[3], 0.3)]


def problems() -> list[Problem]:
    hidden, keeps = tensor(4, 3), (None, torch.tensor([True, False, True, True]))
    parts = itertools.product(heads(), targets(), teachers(), (0.0, 0.5), keeps)
    return [Problem(hidden, *part) for part in parts]


def test_a_problem_comes_back_as_it_was():
    for problem in problems():
        assert_same(unflatten(flatten(problem)), problem)


def assert_same(actual, expected) -> None:
    """The very same tensors and numbers, in the same groups."""
    assert type(actual) is type(expected)
    if isinstance(expected, tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual is expected or actual == expected


def test_the_schema_takes_what_a_problem_holds():
    """In number, and None only where the op allows it."""
    for problem in problems():
        for argument, leaf in zip(schema(), flatten(problem), strict=True):
            kind = argument.split()[0]
            assert leaf is not None or kind.endswith("?"), argument
            if leaf is not None:
                assert isinstance(leaf, torch.Tensor) == kind.startswith("Tensor"), argument


@pytest.mark.parametrize("problem", problems()[::7])
def test_what_has_an_entry_per_token_is_sliced(problem):
    sliced = problem.slice(1, 3)
    whole = dict(zip(schema(), flatten(problem), strict=True))
    for argument, leaf in zip(schema(), flatten(sliced), strict=True):
        before = whole[argument]
        if isinstance(before, torch.Tensor) and len(before) == 4:  # V is 5
            assert torch.equal(leaf, before[1:3]), argument
        else:
            assert leaf is before, argument
