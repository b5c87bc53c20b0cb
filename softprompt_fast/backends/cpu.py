"""The engine of the cpp backend: plans the workspace, then hands the whole loss to csrc/cpu.

The compiled engine never forms [T, V]: it computes tiles of logits that stay in the core's cache.
One stream of logits takes one sweep of the head and keeps nothing. Two take several, between which
the logits of a chunk of rows are kept, or those of some blocks; the others are computed again.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .problem import Problem, check_workspace

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
    hidden = problem.hidden.contiguous()
    tokens, width = hidden.shape
    loss = hidden.new_empty(tokens, dtype=torch.float32)
    dhidden = hidden.new_empty((tokens if problem.with_grad else 0, width), dtype=torch.float32)
    rows, stored, threads, floats = plan(problem)
    torch.ops.softprompt_fast_C.token_loss_(
        hidden,
        problem.weight.contiguous(),
        _contiguous(problem.bias),
        _contiguous(problem.targets),
        problem.label_smoothing,
        _contiguous(problem.more_targets),
        _contiguous(problem.masses),
        _contiguous(problem.teacher),
        _contiguous(problem.teacher_weight),
        _contiguous(problem.teacher_bias),
        problem.beta,
        problem.alpha,
        problem.transform.softcap or 0.0,
        problem.transform.logit_scale,
        problem.transform.temperature,
        rows,
        stored,
        threads,
        loss,
        dhidden,
        hidden.new_empty(floats, dtype=torch.float32),
    )
    return loss, dhidden


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


class Plan(NamedTuple):
    """How the workspace is spent."""

    rows: int  # in a chunk
    stored: int  # of 16 blocks of the vocabulary, so many keep their logits between the sweeps
    threads: int
    floats: int  # size of the workspace in fp32 numbers


def plan(problem: Problem) -> Plan:
    """The fastest within the comfort; if that does not hold the fewest rows, those.

    The comfort grows neither with the tokens nor with the vocabulary, so that memory does not
    either. Beyond two threads' it is no more than one stream of logits [T, V] would take.
    """
    engine = torch.ops.softprompt_fast_C
    panel, vector = engine.panel_rows(), engine.vector_rows()
    tokens, vocabulary = problem.hidden.shape[0], problem.weight.shape[0]
    needed = max(1, -(-tokens // vector)) * vector
    whole, share, logits = problem.workspace_mib * 2**18, COMFORT_MIB * 2**18, tokens * vocabulary
    threads = torch.get_num_threads()
    while True:
        comfort = min(whole, max(whole / 8, 2 * share, min(threads * share, logits)))
        busy = -(-threads // THREADS_PER_PANEL)  # panels that give all threads work
        most = max(MAX_ROWS, -(-2 * threads // THREADS_PER_PANEL) * panel)
        for fewest in ((busy - 1) * panel + vector, vector):
            choices = range(min(fewest, needed), min(most, needed) + 1, vector)
            least = _workspace_floats(problem, choices[0], 0, threads)
            if least <= whole:
                plans = (_within(problem, max(comfort, least), rows, threads) for rows in choices)
                return min(filter(None, plans), key=partial(_cost, problem))
        if threads == 1:
            check_workspace(4 * least, problem.workspace_mib, f"a chunk of {fewest} rows")
        threads = -(-threads // 2)


def _within(problem: Problem, limit: float, rows: int, threads: int) -> Plan | None:
    """The plan with most stored."""
    several_sweeps = problem.teacher is not None or (problem.with_grad and problem.label_smoothing)
    for stored in range(ALL_STORED if several_sweeps else 0, -1, -1):
        floats = _workspace_floats(problem, rows, stored, threads)
        if floats <= limit:
            return Plan(rows, stored, threads, floats)
    return None


def _cost(problem: Problem, plan: Plan) -> float:
    """The time, in products of one token with a head."""
    tokens, streams = problem.hidden.shape[0], len(problem.heads)
    products = 1 + streams * (2 - plan.stored / ALL_STORED)
    return products * (tokens + ROWS_OF_A_HEAD * plan.threads * -(-tokens // plan.rows))


def _workspace_floats(problem: Problem, rows: int, stored: int, threads: int) -> int:
    return torch.ops.softprompt_fast_C.workspace_floats(
        problem.hidden.shape[0],
        rows,
        problem.hidden.shape[1],
        0 if problem.teacher is None else problem.teacher.shape[1],
        problem.weight.shape[0],
        stored,
        problem.with_grad,
        problem.weight.dtype != torch.float32,
        threads,
    )
