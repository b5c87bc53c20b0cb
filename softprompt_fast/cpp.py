"""The engine of the cpp backend: plans the workspace, then hands the whole loss to csrc/cpu.

The compiled engine never forms [T, V]: it computes tiles of logits that stay in the core's cache.
One stream of logits takes one sweep of the head and keeps nothing. Two take several, between which
the logits of some rows are kept, or computed again where the workspace has no room for them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .problem import Problem

# Rows in a chunk. Each chunk streams the head from memory once a sweep: enough rows to hide that,
# few enough that what is kept of them takes little room. A panel of rows is work for 8 threads.
MAX_ROWS = 192
THREADS_PER_PANEL = 4


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
    """The fastest way that fits: keep the logits, then compute them again, then fewer threads.

    Half of the workspace is for comfort; the whole of it saves computing again.
    """
    panel = torch.ops.softprompt_fast_C.panel_rows()
    needed = -(-max(1, problem.hidden.shape[0]) // panel)
    keeps = problem.teacher is not None or bool(problem.with_grad and problem.label_smoothing)
    threads = torch.get_num_threads()
    panels = min(needed, max(MAX_ROWS // panel, -(-threads // THREADS_PER_PANEL)))
    whole = problem.workspace_mib * 2**20 / 4
    while True:
        for stored in range(2, -1, -1) if keeps else (0,):
            for limit in (whole / 2, whole):
                for rows in range(panels * panel, 0, -panel):
                    floats = _workspace_floats(problem, rows, stored, threads)
                    if floats <= limit:
                        return Plan(rows, stored, threads, floats)
        if threads == 1:
            checks.workspace(4 * floats, problem.workspace_mib, f"a panel of {panel} rows")
        threads = -(-threads // 2)


def _workspace_floats(problem: Problem, rows: int, stored: int, threads: int) -> int:
    return torch.ops.softprompt_fast_C.workspace_floats(
        rows,
        problem.hidden.shape[1],
        0 if problem.teacher is None else problem.teacher.shape[1],
        problem.weight.shape[0],
        stored,
        problem.with_grad,
        problem.weight.dtype != torch.float32,
        threads,
    )
