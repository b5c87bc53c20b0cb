"""The engine of the cpp backend: plans the workspace, then hands the whole loss to csrc/cpu.

The compiled engine never forms [T, V]: it computes tiles of logits that stay in the core's cache.
One stream of logits takes one sweep of the head and keeps nothing. Two take several, between which
the logits of a chunk of rows are kept, or those of some blocks; the others are computed again.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .problem import NO_TARGET, NO_TEACHER, Problem, check_workspace

# A panel of rows is work for so many threads; with work for twice as many, few of them wait.
THREADS_PER_PANEL = 8
MAX_ROWS = 192  # of a chunk, where that is not too few
# All logits are kept between two sweeps: PERIOD in csrc/cpu/problem.h.
ALL_STORED = 16
# Each chunk streams the head from memory once a sweep. That takes as long as so many rows more
# would, for each thread: the threads share the memory. Fitted to two threads.
ROWS_OF_A_HEAD = 2
# The workspace where more would only be faster: for each thread, and for two at least.
COMFORT_MIB = 16


def token_loss(problem: Problem) -> tuple[Tensor, Tensor]:
    """loss [T] fp32, dhidden [T, D] fp32 (empty without gradient)."""
    problem = problem.contiguous()
    hidden, head = problem.hidden, problem.head
    teacher = problem.teacher or NO_TEACHER
    teacher_weight, teacher_bias, _ = teacher.head or (None, None, None)
    tokens, width = hidden.shape
    loss = hidden.new_empty(tokens, dtype=torch.float32)
    dhidden = hidden.new_empty((tokens if problem.with_grad else 0, width), dtype=torch.float32)
    rows, stored, threads, floats = plan(problem)
    torch.ops.softprompt_fast_C.token_loss_(
        hidden,
        head.weight,
        head.bias,
        *head.transform,
        *(problem.target or NO_TARGET).entries(),
        teacher.hidden,
        teacher_weight,
        teacher_bias,
        teacher.beta,
        problem.alpha,
        rows,
        stored,
        threads,
        loss,
        dhidden,
        hidden.new_empty(floats, dtype=torch.float32),
    )
    return loss, dhidden


class Plan(NamedTuple):
    """How the workspace is spent."""

    rows: int  # in a chunk
    stored: int  # of 16 blocks of the vocabulary, so many keep their logits between the sweeps
    threads: int
    floats: int  # size of the workspace in fp32 numbers


def plan(problem: Problem) -> Plan:
    """The fastest plan within the comfort; where not even the fewest rows fit it, those.

    Fewer threads than there are, and fewer rows than give all of them work, are for a workspace
    that holds no more.
    """
    whole = problem.workspace_mib * 2**18
    for threads in _halvings(torch.get_num_threads()):
        for fewest in _fewest_rows(threads):
            choices = _choices_of_rows(problem, fewest, threads)
            least = _workspace_floats(problem, choices[0], 0, threads)
            if least <= whole:
                limit = max(_comfort(problem, threads), least)
                plans = [_with_most_stored(problem, rows, threads, limit) for rows in choices]
                return min(filter(None, plans), key=partial(_cost, problem))
    check_workspace(4 * least, problem.workspace_mib, f"a chunk of {fewest} rows")
    raise AssertionError("what exceeds the workspace has been refused")


def _halvings(threads: int) -> Iterator[int]:
    while threads > 1:
        yield threads
        threads = -(-threads // 2)
    yield 1


def _fewest_rows(threads: int) -> tuple[int, int]:
    """Of a chunk: so many that all threads have work, or one vector of rows."""
    panel, vector = _engine().panel_rows, _engine().vector_rows
    busy_panels = -(-threads // THREADS_PER_PANEL)
    return (busy_panels - 1) * panel + vector, vector


def _choices_of_rows(problem: Problem, fewest: int, threads: int) -> range:
    panel, vector = _engine().panel_rows, _engine().vector_rows
    needed = max(1, -(-len(problem.hidden) // vector)) * vector
    most = max(MAX_ROWS, -(-2 * threads // THREADS_PER_PANEL) * panel)
    return range(min(fewest, needed), min(most, needed) + 1, vector)


def _comfort(problem: Problem, threads: int) -> float:
    """The fp32 numbers beyond which more would only be faster.

    They grow neither with the tokens nor with the vocabulary, so that memory does not either.
    Beyond two threads' share they are no more than one stream of logits [T, V] would take.
    """
    whole, share = problem.workspace_mib * 2**18, COMFORT_MIB * 2**18
    logits = len(problem.hidden) * len(problem.head.weight)
    return min(whole, max(whole / 8, 2 * share, min(threads * share, logits)))


def _with_most_stored(problem: Problem, rows: int, threads: int, limit: float) -> Plan | None:
    smoothing = problem.target is not None and problem.target.smoothing
    several_sweeps = problem.teacher is not None or (problem.with_grad and smoothing)
    for stored in range(ALL_STORED if several_sweeps else 0, -1, -1):
        floats = _workspace_floats(problem, rows, stored, threads)
        if floats <= limit:
            return Plan(rows, stored, threads, floats)
    return None


def _cost(problem: Problem, plan: Plan) -> float:
    """The time, in products of one token with a head."""
    tokens, streams = len(problem.hidden), len(problem.streams)
    products = 1 + streams * (2 - plan.stored / ALL_STORED)
    return products * (tokens + ROWS_OF_A_HEAD * plan.threads * -(-tokens // plan.rows))


def _workspace_floats(problem: Problem, rows: int, stored: int, threads: int) -> int:
    floats: int = _engine().workspace_floats(
        problem.hidden.shape[0],
        rows,
        problem.hidden.shape[1],
        0 if problem.teacher is None else problem.teacher.hidden.shape[1],
        problem.head.weight.shape[0],
        stored,
        problem.with_grad,
        getattr(_engine().Dtype, str(problem.head.weight.dtype).removeprefix("torch.")),
        threads,
    )
    return floats


@cache
def _engine() -> Any:
    """What this machine's engine says of itself; only where the extension could be imported."""
    return importlib.import_module("softprompt_fast._C")
