"""The private methods of ``transformers.Trainer`` that training relies on are still what they were.

A new version of transformers that breaks one of these laws breaks training, maybe without an error.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

import pytest
from transformers import Trainer

from softprompt_fast.training.checkpointed_trainer import CheckpointedTrainer
from softprompt_fast.training.logged_trainer import LoggedTrainer
from softprompt_fast.training.trainer import SoftPromptTrainer
from softprompt_fast.training.trainer_hooks import HookedTrainer


@cache
def tree(kind: type) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(kind)))


def private(names) -> set[str]:
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def used_by(kind: type) -> set[str]:
    """The names of private attributes in its source, its own and others'."""
    return private(node.attr for node in ast.walk(tree(kind)) if isinstance(node, ast.Attribute))


def calls(kind: type, name: str) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(tree(kind))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == name
    ]


def check_takes(method, call: ast.Call) -> None:
    """Raises TypeError unless ``method`` takes the arguments of ``call``."""
    positional = [None for argument in call.args if not isinstance(argument, ast.Starred)]
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    is_whole = len(positional) + len(named) == len(call.args) + len(call.keywords)
    signature = inspect.signature(method)
    bind = signature.bind if is_whole else signature.bind_partial
    bind(None, *positional, **named)


OVERRIDDEN = sorted(private(vars(HookedTrainer)))
RELIED_ON = sorted(used_by(HookedTrainer) | set(OVERRIDDEN))


@pytest.mark.parametrize("name", RELIED_ON)
def test_a_private_method_exists_takes_what_is_passed_and_is_used_by_the_trainer(name):
    for call in calls(HookedTrainer, name):
        check_takes(getattr(Trainer, name), call)
    assert name in used_by(Trainer)
    if name in OVERRIDDEN:
        assert callable(getattr(Trainer, name))
        assert calls(Trainer, name)
        for call in calls(Trainer, name):
            check_takes(getattr(HookedTrainer, name), call)


def test_the_learning_rate_of_a_step_is_passed_by_name():
    for call in calls(Trainer, "_maybe_log_save_evaluate"):
        assert "learning_rate" in [keyword.arg for keyword in call.keywords]


def test_there_are_no_others():
    assert {"_save_checkpoint", "_get_train_sampler"} < set(RELIED_ON)
    hooks = {name for name in vars(HookedTrainer) if not name.startswith("_")}
    assert not hooks.intersection(dir(Trainer))  # else one of them would be overridden unawares
    for kind in (LoggedTrainer, CheckpointedTrainer, SoftPromptTrainer):
        assert not private(used_by(kind) | set(vars(kind))).intersection(dir(Trainer))
