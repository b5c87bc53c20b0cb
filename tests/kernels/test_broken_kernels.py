"""What the kernels' tests are there to find, they find in copies with a broken line."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from cuda_on_cpu import emulator
from cuda_on_cpu.row_contract import check_run, check_small_divergence, make_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.emulated,
    pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing())),
]


def one_block(kernels):
    """Nothing is held: the gradient is written over logits on their way in."""
    for descending in (False, True):
        with kernels.device(descending=descending, **kernels.facts(paired=0, alone=0, major=8)):
            check_run(kernels, make_rows(9003, dtype=torch.bfloat16))


def a_cluster(kernels):
    for descending in (False, True):
        with kernels.device(descending=descending, **kernels.facts(paired=150, alone=150)):
            check_run(kernels, make_rows(9003))


def several_targets(kernels):
    for descending in (False, True):
        with kernels.device(descending=descending, **kernels.facts(paired=0, alone=9, major=8)):
            check_run(kernels, make_rows(2003, entries=40))


def confident_students(beta, distance, kernels):
    for seed in range(20):
        rows = make_rows(515, beta, seed=seed, spread=12.0, distance=distance)
        check_run(kernels, rows)


def half_confirmed_students(kernels):
    """JSD of a student sure of an entry to which its teacher gives 1/2."""
    rows = make_rows(515, 0.3, spread=1.0, distance=None)
    rows.logits[:, 7] += 20.0
    rows.teacher[:, 7] += 6.5
    check_run(kernels, rows)


def confident_targets(kernels):
    rows = make_rows(515)
    rows.logits.scatter_add_(-1, rows.targets.unsqueeze(-1), torch.full((3, 1), 30.0))
    check_run(kernels, rows)


def small_divergence(kernels):
    check_small_divergence(kernels, 1.0)


forward_kl = partial(confident_students, 0.0, 0.5)
reverse_kl = partial(confident_students, 1.0, None)
ruled_out = partial(confident_students, 0.3, None)
SCENARIOS = (
    one_block,
    a_cluster,
    several_targets,
    forward_kl,
    reverse_kl,
    half_confirmed_students,
    ruled_out,
    confident_targets,
    small_divergence,
)

OVERWRITTEN = ("worker.cuh", "if (student.held < octets) __syncthreads();")


@pytest.mark.parametrize(
    ("place", "broken", "scenario", "seen"),
    [
        (OVERWRITTEN, "", one_block, "dz: L2"),
        (OVERWRITTEN, "if (o < octets) __syncthreads();", one_block, "different barriers"),
        (("worker.cuh", "__pipeline_wait_prior(0);"), "", a_cluster, "loss: error nan"),
        (("reduce.cuh", "__syncthreads();"), "", a_cluster, "loss: error"),
        (("reduce.cuh", "cluster_sync();\n  T row"), "T row", a_cluster, "loss: error"),
        (
            ("worker.cuh", "const {\n    __syncthreads();\n    for_entries"),
            "const {\n    for_entries",
            several_targets,
            "dz: L2",
        ),
        (
            ("worker.cuh", "row.nll_slope(z_more[k], mass)"),
            "row.nll_slope(z_more[k], 0.0f)",
            several_targets,
            "dz: L2",
        ),
        (("worker.cuh", "balance(tops, measures.slope, lift);"), "", forward_kl, "dz: L2"),
        (("formulas.cuh", "d - shift.rate"), "d", reverse_kl, "dz: L2"),
        (
            ("formulas.cuh", "over.rate - shift.rate"),
            "over.rate",
            half_confirmed_students,
            "dz: L2",
        ),
        (("formulas.cuh", "ruled_out = d_peak > RULED_OUT"), "ruled_out = 0", ruled_out, "dz: L2"),
        (
            ("row.cuh", "elsewhere - missing"),
            "elsewhere + (q(z_target) - 1.0f)",
            confident_targets,
            "dz: L2",
        ),
        (("formulas.cuh", "SMALL ? q"), "0.0f ? q", small_divergence, "loss"),
    ],
    ids=[
        "no barrier before overwriting",
        "a barrier for some",
        "copies not waited for",
        "warps not waited for",
        "blocks not waited for",
        "targets overwritten too early",
        "no mass at more targets",
        "no balance",
        "reverse KL not shifted",
        "JSD not shifted",
        "JSD not ruled out",
        "q - 1",
        "no series",
    ],
)
def test_a_broken_kernel_is_seen(tmp_path, place, broken, scenario, seen):
    file, text = place
    kernels = tmp_path / "cuda"
    shutil.copytree(emulator.KERNELS, kernels)
    source = (kernels / file).read_text()
    assert text in source
    (kernels / file).write_text(source.replace(text, broken))
    with pytest.raises((AssertionError, RuntimeError), match=seen):
        scenario(emulator.build(tmp_path, kernels))


def test_none_of_these_is_broken(tmp_path):
    kernels = emulator.build(tmp_path)
    for scenario in SCENARIOS:
        scenario(kernels)
