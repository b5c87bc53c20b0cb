"""The engine of the cpp backend: plans the workspace, then hands the whole loss to csrc/cpu.

The compiled engine never forms [T, V]: it computes tiles of logits that stay in the core's cache.
One stream of logits takes one sweep of the head and keeps nothing. Two take several, between which
the logits of some rows are kept, or computed again where the workspace has no room for them.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .problem import Problem

# Rows in a chunk. Each chunk streams the head from memory once a sweep: enough rows to hide that,
# few enough that what is kept of them takes little room. A panel of rows is work for 8 threads;
# with work for twice as many, few of them wait.
MAX_ROWS = 192
THREADS_PER_PANEL = 8
# What may be kept of the logits: this, or what those of one stream [T, V] take if it is more.
KEPT_MIB = 24


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
    stored: int  # streams whose logits are kept between the sweeps
    threads: int
    floats: int  # size of the workspace in fp32 numbers


def plan(problem: Problem) -> Plan:
    """The fastest way that fits: keep the logits, then compute some again, then fewer threads.

    Half of the workspace is for comfort; the whole of it saves computing again.
    """
    panel = torch.ops.softprompt_fast_C.panel_rows()
    tokens, vocabulary = max(1, problem.hidden.shape[0]), problem.weight.shape[0]
    needed = -(-tokens // panel)
    several = problem.teacher is not None or (problem.with_grad and problem.label_smoothing)
    streams = len(problem.heads) if several else 0  # of more sweeps than one
    whole, kept = problem.workspace_mib * 2**18, max(KEPT_MIB * 2**18, tokens * vocabulary)
    threads = torch.get_num_threads()
    most = min(needed, max(MAX_ROWS // panel, -(-2 * threads // THREADS_PER_PANEL)))
    while True:
        busy = min(needed, -(-threads // THREADS_PER_PANEL))  # panels that give all threads work
        choices = product((busy, 1), range(streams, -1, -1), (whole / 2, whole))
        for fewest, stored, limit in choices:
            for panels in range(most, fewest - 1, -1):
                floats = _workspace_floats(problem, panels * panel, stored, threads)
                rows = min(panels * panel, tokens)
                if floats <= limit and stored * rows * vocabulary <= kept:
                    return Plan(panels * panel, stored, threads, floats)
        if threads == 1:
            checks.workspace(4 * floats, problem.workspace_mib, f"a panel of {panel} rows")
        threads = -(-threads // 2)


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
