"""The row kernels of csrc/cuda hold their contract, on a GPU or emulated on the CPU.

Legend: C rows, V vocabulary, K more targets, q student, p teacher.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from contract import DTYPES, each_dtype
from cuda_on_cpu import emulator
from cuda_on_cpu.row_contract import (
    BETAS,
    assert_same,
    assert_same_results,
    check,
    check_run,
    check_small_divergence,
    make_rows,
    poisoned,
    run,
)

from softprompt_fast import backends
from softprompt_fast.backends import cuda_rows

each_beta = pytest.mark.parametrize("beta", BETAS, ids="beta{}".format)
each_loss = pytest.mark.parametrize("beta", [None, *BETAS], ids="beta{}".format)
each_blocks = pytest.mark.parametrize("blocks", [1, 2, 4, 8], ids="blocks{}".format)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    if (reason := emulator.missing()) is not None:
        pytest.skip(reason)
    return emulator.build(tmp_path_factory.mktemp("rows_on_cpu"))


@pytest.fixture(params=["emulated"] + ["gpu"] * (backends.available()["cuda"] is None))
def kernels(request):
    return cuda_rows if request.param == "gpu" else request.getfixturevalue("emulated")


# ---- numbers


@each_loss
@each_dtype
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 8, 64, 131, 1000, 5003], ids="V{}".format)
def test_every_vocabulary(kernels, vocabulary, dtype, beta):
    for in_place in (True, False):
        check_run(kernels, make_rows(vocabulary, beta, dtype=dtype), in_place=in_place)


@each_loss
def test_a_long_vocabulary(kernels, beta):
    check_run(kernels, make_rows(2**18 - 3, beta, count=1, dtype=torch.bfloat16))


@each_loss
@each_dtype
def test_every_option(kernels, beta, dtype):
    for options in (
        {"bias": True},
        {"softcap": 5.0, "bias": True, "logit_scale": 1.7},
        {"logit_scale": 0.0625, "spread": 20.0},
        {"temperature": 3.0, "softcap": 30.0},
        {"temperature": 0.5, "bias": True},
    ):
        check_run(kernels, make_rows(131, beta, dtype=dtype, **options))
        if beta is not None:
            options |= {"alpha": 0.3}
        for label_smoothing in (0.1, 1.0):
            rows = make_rows(131, beta, dtype=dtype, label_smoothing=label_smoothing, **options)
            check_run(kernels, rows)


@each_dtype
@pytest.mark.parametrize("entries", [0, 1, 32, 130], ids="K{}".format)
def test_a_target_distribution_of_several_entries(kernels, entries, dtype):
    for options in (
        {},
        {"bias": True, "label_smoothing": 0.2},
        {"softcap": 5.0, "logit_scale": 1.7, "temperature": 0.5},
        {"spread": 20.0},
    ):
        rows = make_rows(131, dtype=dtype, entries=entries, **options)
        check_run(kernels, rows)
        check_run(kernels, rows, in_place=False, lifted=dtype == torch.float16)


def test_many_entries_of_a_long_vocabulary(kernels):
    check_run(kernels, make_rows(40_003, count=2, entries=20_001, dtype=torch.bfloat16))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.999, 1.0], ids="alpha{}".format)
@each_beta
def test_a_mixture_with_the_targets_likelihood(kernels, alpha, beta):
    check_run(kernels, make_rows(131, beta, alpha=alpha))
    check_run(kernels, make_rows(131, beta, alpha=alpha, distance=0.0))


@pytest.mark.parametrize("beta", [1e-9, 1e-5, 1e-3, 0.999, 1 - 1e-5, 1 - 1e-9], ids="beta{}".format)
def test_a_beta_that_is_almost_0_or_1(kernels, beta):
    for spread, distance in [(0.5, 0.5), (2.0, None), (200.0, 0.5)]:
        check_run(kernels, make_rows(131, beta, spread=spread, distance=distance))


@each_beta
@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3], ids="distance{}".format)
def test_the_contract_as_the_student_converges(kernels, distance, beta):
    for temperature in (0.25, 1.0, 4.0):
        check_run(kernels, make_rows(131, beta, distance=distance, temperature=temperature))


@each_beta
@pytest.mark.parametrize("distance", [0.5, None], ids=["agrees", "disagrees"])
def test_a_confident_student_keeps_its_gradient(kernels, beta, distance):
    """One entry has nearly all of q: what is left of the others must not be lost beside it."""
    for seed in range(20):
        check_run(kernels, make_rows(515, beta, seed=seed, spread=12.0, distance=distance))


@pytest.mark.parametrize("gap", [5.0, 15.0, 30.0, 60.0], ids="gap{}".format)
@each_dtype
def test_confident_targets_keep_their_gradient(kernels, gap, dtype):
    """1 - q of the target shrinks to 1e-26 here: the relative bound still holds."""
    for seed in range(5):
        rows = make_rows(515, seed=seed, dtype=dtype)
        rows.logits.scatter_add_(-1, rows.targets.unsqueeze(-1), torch.full((3, 1), gap))
        check_run(kernels, rows, lifted=dtype == torch.float16)


@each_beta
def test_small_divergences_are_not_lost_in_cancellation(kernels, beta):
    check_small_divergence(kernels, beta)
    same = make_rows(8209, beta, distance=0.0, spread=4.0)
    assert run(kernels, same)[0].abs().max() <= 1e-6


@each_loss
def test_students_far_from_their_teacher(kernels, beta):
    """q underflows where p is 1 and the other way round; logits of thousands."""
    for spread in (12.0, 200.0, 3000.0):
        check_run(kernels, make_rows(131, beta, spread=spread, distance=2.0))


@each_loss
def test_saturated_softcap(kernels, beta):
    for seed in range(6):
        check_run(kernels, make_rows(131, beta, seed=seed, spread=12.0, softcap=6.0, count=1))


@each_loss
@each_dtype
def test_one_entry_of_vocabulary_is_exactly_zero(kernels, beta, dtype):
    rows = make_rows(1, beta, dtype=dtype, bias=True, softcap=5.0, label_smoothing=0.1)
    for value in run(kernels, rows)[:2]:
        assert torch.equal(value, torch.zeros_like(value))


# ---- entries and rows that are not ordinary


@each_loss
def test_an_entry_at_minus_infinity_is_as_good_as_absent(kernels, beta):
    rows = make_rows(70, beta, bias=True, temperature=1.25)
    absent = torch.tensor([0, 33, 69])
    present = [v for v in range(70) if v not in absent]
    if rows.targets is not None:
        rows.targets = torch.tensor([1, 34, 68])
    biases = {"bias", "teacher_bias"} & rows.options.keys()
    for name in biases:
        rows.options[name][absent] = -torch.inf
    loss, dz, _ = run(kernels, rows)
    assert (dz[:, absent] == 0).all()
    smaller = rows.with_options(**{name: rows.options[name][present] for name in biases})
    smaller.logits = rows.logits[:, present]
    if beta is None:
        smaller.targets = rows.targets - (rows.targets > 0).long() - (rows.targets > 33).long()
    else:
        smaller.teacher = rows.teacher[:, present]
    check(smaller, loss, dz[:, present])


def test_a_target_at_minus_infinity_has_infinite_loss(kernels):
    rows = make_rows(131, bias=True)
    rows.options["bias"][rows.targets[1]] = -torch.inf
    loss, dz, _ = run(kernels, rows)
    assert loss[1] == torch.inf
    assert dz[1, rows.targets[1]] == -1
    assert loss[[0, 2]].isfinite().all()
    assert dz.isfinite().all()


@each_beta
def test_underflow_in_both_distributions_contributes_nothing(kernels, beta):
    rows = make_rows(131, beta)
    rows.logits[:, ::2] -= 600
    rows.teacher[:, ::2] -= 600
    check_run(kernels, rows)


@each_loss
@pytest.mark.parametrize("poison", ["nan", "inf", "all -inf", "teacher nan", "teacher inf"])
@each_dtype
def test_a_poisoned_row_is_nan_and_no_other(kernels, beta, poison, dtype):
    rows = make_rows(1000, beta, dtype=dtype)
    clean = run(kernels, rows)
    for place in (0, 517, 999):
        spoilt = rows.take(slice(None))
        spoilt.logits = rows.logits.clone()
        row = spoilt.logits[1]
        if poison.startswith("teacher"):
            if beta is None:
                return
            spoilt.teacher = rows.teacher.clone()
            row = spoilt.teacher[1]
        if poison == "all -inf":
            row.fill_(-torch.inf)
        else:
            row[place] = float(poison.split()[-1])
        lifted = dtype == torch.float16
        loss, dz, unscale = run(kernels, spoilt, lifted=lifted)
        assert loss[1].isnan()
        assert dz[1].isnan().all()
        assert not lifted or unscale.isfinite().all()
        loss, dz, _ = run(kernels, spoilt)
        assert_same(loss[[0, 2]], clean[0][[0, 2]], dz[[0, 2]], clean[1][[0, 2]])


@each_loss
@pytest.mark.parametrize("target", [-1, -100, 131, 2**31, 2**40 + 3, -(2**62)])
def test_a_target_out_of_range_makes_its_row_nan(kernels, beta, target):
    options = {} if beta is None else {"alpha": 0.5}
    rows = make_rows(131, beta, **options)
    clean = run(kernels, rows)
    rows.targets[1] = target
    loss, dz, _ = run(kernels, rows)
    assert loss[1].isnan()
    assert dz[1].isnan().all()
    assert_same(loss[[0, 2]], clean[0][[0, 2]], dz[[0, 2]], clean[1][[0, 2]])


@pytest.mark.parametrize("entry", [-1, 131, 2**31, 2**40, -(2**62)])
def test_an_entry_with_mass_out_of_range_makes_its_row_nan(kernels, entry):
    rows = make_rows(131, entries=5)
    clean = run(kernels, rows)
    rows.options["more_targets"][1, 2] = entry
    rows.options["masses"][1, 3] = 0.01
    loss, dz, _ = run(kernels, rows)
    assert loss[1].isnan()
    assert dz[1].isnan().all()
    assert_same(loss[[0, 2]], clean[0][[0, 2]], dz[[0, 2]], clean[1][[0, 2]])


@each_loss
@each_dtype
def test_rows_that_do_not_count_are_zero_whatever_they_hold(kernels, beta, dtype):
    options = {} if beta is None else {"alpha": 0.5}
    rows = make_rows(131, beta, count=4, dtype=dtype, **options)
    clean = run(kernels, rows)
    keep = torch.tensor([True, False, True, False])
    rows.options["keep"] = keep
    rows.logits[1] = torch.nan
    rows.targets[~keep] = -100
    if beta is not None:
        rows.teacher[3] = torch.inf
    for lifted in {False, dtype == torch.float16}:
        loss, dz, unscale = run(kernels, rows, lifted=lifted)
        assert (loss[~keep] == 0).all()
        assert (dz[~keep] == 0).all()
        if lifted:
            assert (unscale[~keep] == 1).all()
        else:
            assert_same(loss[keep], clean[0][keep], dz[keep], clean[1][keep])


# ---- fp16


@each_loss
def test_fp16_leaves_high_in_its_range(kernels, beta):
    """Little is subnormal, nothing infinite. Only as far as known before: a bound for the row."""
    for options in (
        {},
        {"logit_scale": 1e-3},
        {"logit_scale": 50.0, "spread": 0.05},
        {"temperature": 1e6, "spread": 1e6},
        {"softcap": 5.0, "label_smoothing": 0.2},
        {"spread": 40.0, "distance": None},
    ):
        if beta is not None and "label_smoothing" in options:
            options |= {"alpha": 0.4}
        rows = make_rows(515, beta, dtype=torch.float16, **options)
        loss, dz, unscale = run(kernels, rows, lifted=True)
        check(rows, loss, dz, unscale)
        mantissa, _ = torch.frexp(unscale)
        assert (mantissa == 0.5).all(), "not a power of two"
        largest = dz.abs().amax(-1)
        assert (largest < 2**15).all()
        assert (largest > (2**11 if beta is None else 2**3)).all()
        plain = run(kernels, rows)
        assert_same(loss, plain[0])


# ---- how a row is divided


def octets(vocabulary: int) -> int:
    return -(-vocabulary // 8)


def device_for(emulated, vocabulary: int, beta: float | None, blocks: int) -> dict[str, int]:
    """A device on which a row takes so many blocks."""
    need = (1 if beta is None else 2) * -(-octets(vocabulary) // blocks)
    return emulated.facts(paired=need, alone=need)


@each_loss
@each_blocks
@pytest.mark.parametrize("vocabulary", [64, 131, 1000, 9003], ids="V{}".format)
def test_every_cluster(emulated, beta, blocks, vocabulary):
    for dtype in DTYPES:
        rows = make_rows(vocabulary, beta, dtype=dtype, count=2, bias=True)
        results = []
        for descending in (False, True):
            facts = device_for(emulated, vocabulary, beta, blocks)
            with emulated.device(descending=descending, **facts):
                assert emulated.plan(vocabulary, 1 if beta is None else 2).blocks == blocks
                results.append(run(emulated, rows))
                assert_same_results(run(emulated, rows, in_place=False), results[0])
        check(rows, *results[0])
        assert_same_results(results[1], results[0])


@each_loss
@each_dtype
@pytest.mark.parametrize("major", [8, 9], ids=["sm_80", "sm_90"])
def test_what_is_not_held_is_read_again_with_the_same_result(emulated, beta, dtype, major):
    """One block for the row; from all held to none, the gradient over the logits it comes from."""
    vocabulary = 9003
    every = octets(vocabulary)
    rows = make_rows(vocabulary, beta, dtype=dtype, count=2, bias=True)
    with emulated.device(**emulated.facts(paired=0, alone=2 * every, major=8)):
        expected = run(emulated, rows)
    check(rows, *expected)
    # with clusters a row is divided as long as an eighth of it fits
    held = (every + 100, every, every - 1, 700, 0) if major == 8 else (every // 8 - 1, 5, 0)
    for alone in held:
        for descending in (False, True):
            facts = emulated.facts(paired=0, alone=alone, major=major)
            with emulated.device(descending=descending, **facts):
                plan = emulated.plan(vocabulary, 1 if beta is None else 2)
                assert plan.blocks == 1
                assert plan.held_student == min(alone, every)
                for in_place in (True, False):
                    assert_same_results(run(emulated, rows, in_place=in_place), expected)


@each_dtype
@pytest.mark.parametrize(
    ("blocks", "held"),  # a row that is not held belongs to one block
    [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (1, 0.3), (1, 0.0)],
)
def test_entries_lie_in_the_slices_of_several_blocks(emulated, blocks, held, dtype):
    vocabulary, entries = 9003, 40
    rows = make_rows(vocabulary, dtype=dtype, count=2, entries=entries, bias=True)
    need = int(held * -(-octets(vocabulary) // blocks)) + entries // 8
    results = []
    for descending in (False, True):
        major = 9 if held == 1 else 8
        facts = emulated.facts(paired=need, alone=need, major=major)
        with emulated.device(descending=descending, **facts):
            results.append(run(emulated, rows))
            assert_same_results(run(emulated, rows, in_place=False), results[0])
    check(rows, *results[0])
    assert_same_results(results[1], results[0])


@each_beta
def test_a_cluster_that_reads_some_of_the_teacher_again(emulated, beta):
    vocabulary = 20011
    slice = -(-octets(vocabulary) // 8)
    rows = make_rows(vocabulary, beta, dtype=torch.bfloat16, count=2)
    results = {}
    for paired, alone, threads, held in (
        (2 * slice, 2 * slice, 256, slice),  # two blocks on a multiprocessor
        (2 * slice - 9, 4 * slice, 256, slice - 9),
        (slice + slice // 2, 2 * slice, 320, slice),  # one, that holds all
        (0, slice + 5, 320, 5),
        (0, slice, 320, 0),
    ):
        with emulated.device(**emulated.facts(paired=paired, alone=alone)):
            assert emulated.plan(vocabulary, 2)[:5] == (8, threads, slice, slice, held)
            result = run(emulated, rows)
            assert_same_results(result, results.setdefault(threads, result))
    for result in results.values():
        check(rows, *result)


@pytest.mark.parametrize(
    ("vocabulary", "streams", "blocks", "threads", "held"),
    [
        (2_000, 1, 1, 256, 1.0),
        (32_000, 1, 2, 512, 1.0),
        (128_256, 1, 8, 512, 1.0),
        (151_936, 1, 8, 512, 1.0),
        (262_144, 1, 8, 1024, 1.0),
        (464_000, 1, 1, 1024, 0.124),
        (32_000, 2, 4, 256, 1.0),
        (50_257, 2, 4, 256, 1.0),
        (128_256, 2, 8, 256, 0.887),
        (151_936, 2, 8, 512, 1.0),
        (262_144, 2, 8, 512, 0.879),
    ],
)
def test_the_plan_on_an_h200(emulated, vocabulary, streams, blocks, threads, held):
    """held: share of the logits read once. Fewer threads: two blocks on a multiprocessor."""
    plan = emulated.plan(vocabulary, streams)
    assert (plan.blocks, plan.threads) == (blocks, threads)
    share = (plan.held_student + plan.held_teacher) / (streams * plan.slice)
    assert share == pytest.approx(held, abs=0.001)
    assert plan.shared_bytes + emulated.library.exchange_bytes() <= 232448


@each_loss
def test_results_do_not_depend_on_other_rows_or_on_what_is_asked(kernels, beta):
    for dtype in DTYPES:
        rows = make_rows(1003, beta, count=5, dtype=dtype, bias=True, alpha=0.5)
        if beta is None:
            del rows.options["alpha"]
        together = run(kernels, rows)
        assert_same_results(run(kernels, rows), together)
        assert_same_results(
            run(kernels, rows.take(slice(3, 4))), [v if v is None else v[3:4] for v in together]
        )
        assert_same(run(kernels, rows, with_grad=False)[0], together[0])
        # rows of dz that begin anywhere
        for dz_stride in (1003, 1005, 1016):
            assert_same_results(run(kernels, rows, in_place=False, dz_stride=dz_stride), together)


def test_no_rows(kernels):
    for beta in (None, *BETAS):
        loss, dz, _ = run(kernels, make_rows(131, beta, count=0))
        assert loss.shape == (0,)
        assert dz.shape == (0, 131)


@each_loss
def test_rows_beyond_two_to_the_31_entries(emulated, beta):
    """Four rows that lie 2^29 entries and more apart, in memory of which little is touched."""
    stride, count = 2**29 + 2**27, 4
    size = 4 * (count * stride)
    map_noreserve = 0x4000
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve)
    buffer = torch.frombuffer(memory, dtype=torch.float32).view(count, stride)
    rows = make_rows(131, beta, count=count, dtype=torch.bfloat16)
    expected = run(emulated, rows)
    logits = buffer[:, :131]
    logits.copy_(rows.logits)
    loss = torch.full((count,), torch.nan)
    dz = buffer.view(torch.bfloat16)[:, :131]
    if beta is None:
        emulated.sparse_target_rows_(logits, rows.target, loss, dz)
    else:
        emulated.divergence_rows_(logits, poisoned(rows.teacher, "cpu"), loss, dz, beta=beta)
    assert_same(loss, expected[0], dz, expected[1])
