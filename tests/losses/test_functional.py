"""Every loss on every backend holds the numerics contract, and equals PyTorch's own losses."""

from __future__ import annotations

import inspect
import re
from itertools import product

import pytest
import torch
from contract import (
    CPU_BACKENDS,
    DTYPES,
    IGNORED,
    INTERPRETED,
    LOSSES,
    Case,
    cases,
    check,
    dtypes_of,
    each_backend,
    each_backend_and_dtype,
    each_dtype,
    each_loss,
    effort,
    hold,
    loss_bound,
    make_case,
    oracle,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import softprompt_fast as spf
from softprompt_fast.backends import cpu
from softprompt_fast.backends.problem import Head, HiddenTeacher, Problem

each_beta = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0], ids="beta{}".format)


@pytest.mark.long_interpreted
@each_backend
def test_nll(backend):
    hold(backend, cases("linear_nll"))


@pytest.mark.long_interpreted
@each_backend
def test_kl(backend):
    hold(backend, cases("linear_kl"))


@pytest.mark.long_interpreted
@each_backend
def test_distill(backend):
    hold(backend, cases("linear_distill"))


@each_backend
@each_loss
@pytest.mark.parametrize("vocabulary", [1, 2, 64, 131, 50257], ids="V{}".format)
def test_every_vocabulary(backend, loss, vocabulary):
    if backend in INTERPRETED:
        vocabulary = min(vocabulary, 515)
    for dtype in DTYPES:
        case = make_case(loss, shape=(3,), vocabulary=vocabulary, dtype=dtype, reduction="none")
        check(case, *run(case, backend=backend))


@pytest.mark.long_interpreted
@each_backend_and_dtype
@each_loss
def test_a_wide_head(backend, loss, dtype):
    case = make_case(
        loss,
        shape=(11,),
        width=576,
        vocabulary=effort(backend, 4099),
        dtype=dtype,
        reduction="none",
    )
    check(case, *run(case, backend=backend))


@pytest.mark.long_interpreted
@each_backend_and_dtype
@each_loss
def test_a_head_of_odd_sizes(backend, loss, dtype):
    """Where 16-bit numbers are multiplied in pairs, a row and a column end amid one."""
    for shape in ((3,), (50,)):
        case = make_case(loss, shape=shape, width=101, vocabulary=325, dtype=dtype)
        check(case, *run(case, backend=backend))


@pytest.mark.long_interpreted
@each_backend_and_dtype
@each_loss
def test_a_small_workspace(backend, loss, dtype):
    """Holds the contract, or says how much it needs, and then that is enough."""
    case = make_case(
        loss, shape=(35,), width=40, vocabulary=effort(backend, 5003), dtype=dtype, ignored=0.2
    )
    for workspace_mib in (4, 32):
        check(case, *run(case, backend=backend, workspace_mib=workspace_mib))
    text = r"workspace_mib=0.01 is too small: a .* of \d+ rows needs (\d+) MiB"
    with pytest.raises(ValueError, match=text) as refused:
        run(case, backend=backend, workspace_mib=0.01)
    needed = int(re.match(text, str(refused.value))[1])
    check(case, *run(case, backend=backend, workspace_mib=needed))


def test_what_the_engine_keeps_between_its_sweeps_changes_no_bit(monkeypatch):
    """All logits, some or none, of many rows or of few: those that are computed again are equal."""
    original = cpu.plan
    vector = cpu._engine().vector_rows

    def forced(rows, stored):
        def plan(problem):
            floats = cpu._workspace_floats(problem, rows, stored, threads=2)
            return cpu.Plan(rows, stored, 2, floats)

        return plan

    for arguments in ({"beta": 0.3}, {"beta": 0.0}, {"label_smoothing": 0.1, "alpha": 0.4}):
        case = make_case("linear_distill", shape=(47,), width=24, vocabulary=20011, **arguments)
        monkeypatch.setattr(cpu, "plan", original)
        expected = run(case, backend="cpp")
        for rows, stored in product((vector, 2 * vector, 4 * vector), (0, 1, 7, 15, 16)):
            monkeypatch.setattr(cpu, "plan", forced(rows, stored))
            for result, same in zip(run(case, backend="cpp"), expected, strict=True):
                assert torch.equal(result, same), (arguments, rows, stored)


@settings(max_examples=200)
@given(
    tokens=st.integers(1, 20000),
    vocabulary=st.integers(1, 300_000),
    width=st.integers(1, 4096),
    threads=st.integers(1, 64),
    workspace_mib=st.integers(8, 1024),
)
def test_the_engine_keeps_to_its_comfort(tokens, vocabulary, width, threads, workspace_mib):
    """32 MiB, or 16 a thread up to what logits [T, V] take, or an eighth of a larger workspace."""
    hidden = torch.empty(tokens, width, device="meta")
    head = Head(torch.empty(vocabulary, width, device="meta"))
    problem = Problem(hidden, head, teacher=HiddenTeacher(hidden), workspace_mib=workspace_mib)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        plan = cpu.plan(problem)
    assert 4 * plan.floats <= workspace_mib * 2**20
    logits_mib = 4 * tokens * vocabulary / 2**20
    comfort_mib = max(32, min(16 * plan.threads, logits_mib), workspace_mib / 8)
    assert plan.stored == 0 or 4 * plan.floats <= comfort_mib * 2**20


@each_backend
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0], ids="temperature{}".format)
@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3], ids="distance{}".format)
@each_beta
def test_the_contract_as_the_student_converges(backend, distance, temperature, beta):
    for dtype in dtypes_of(backend):
        case = make_case(
            "linear_kl", distance=distance, dtype=dtype, beta=beta, temperature=temperature
        )
        check(case, *run(case, backend=backend))


@pytest.mark.long_interpreted
@each_backend
@pytest.mark.parametrize("beta", [1e-9, 1e-5, 1e-3, 0.999, 1 - 1e-5, 1 - 1e-9], ids="beta{}".format)
def test_a_beta_that_is_almost_0_or_1(backend, beta):
    for spread, teacher in [(0.5, {}), (2.0, {"teacher_width": 5}), (200.0, {})]:
        case = make_case("linear_kl", beta=beta, spread=spread, reduction="none", **teacher)
        check(case, *run(case, backend=backend))


@each_backend
def test_an_alpha_that_is_close_to_1(backend):
    """The divergence, which is 0 here, must not drown the one thousandth of the target."""
    for seed in range(4):
        case = make_case("linear_distill", alpha=0.999, distance=0.0, reduction="none", seed=seed)
        check(case, *run(case, backend=backend))


@each_backend_and_dtype
def test_a_narrow_head_over_a_long_vocabulary(backend, dtype):
    """The product back has a quarter of a million terms."""
    case = make_case(
        "linear_nll",
        width=4,
        vocabulary=effort(backend, effort(backend, 2**18)),
        dtype=dtype,
        bias=True,
    )
    check(case, *run(case, backend=backend))


@pytest.mark.long_interpreted
@each_backend
@each_loss
@pytest.mark.parametrize(
    ("vocabulary", "strips", "temperature", "beta"),
    [(4500, 3, 1.5, 0.0), (4096, 2, 0.02, 0.3), (4500, 1, 0.02, 1.0)],
)
def test_every_option_over_a_long_vocabulary(backend, loss, vocabulary, strips, temperature, beta):
    """Many tiles and parts, whose statistics have to meet, and strips of the gradient."""
    options = {"bias": True, "softcap": 20.0, "temperature": temperature}
    if loss != "linear_kl":
        options["label_smoothing"] = 0.1
    if loss != "linear_nll":
        options["beta"] = beta
    case = make_case(loss, width=72, vocabulary=vocabulary, dtype=torch.float16, **options)
    case.options["bias"] += 1  # no sum vanishes by chance
    if loss != "linear_kl":
        case.options["bias"][case.targets[::2]] += 20  # certain
    # 0.06 MiB are enough for the statistics of 9 tokens and one strip
    workspace_mib = 0.06 if backend == "streaming" and strips > 1 else 32
    check(case, *run(case, backend=backend, workspace_mib=workspace_mib))


@each_backend
@each_loss
@pytest.mark.parametrize("spread", [4.0, 12.0], ids="spread{}".format)
def test_saturated_softcap(backend, loss, spread):
    """The slope of the cap is 1 - tanh^2: close to 0 where logits are several caps wide."""
    for seed in range(effort(backend, 6)):
        case = make_case(loss, shape=(1,), seed=seed, spread=spread, softcap=6.0)
        check(case, *run(case, backend=backend))


@each_backend
@pytest.mark.parametrize("gap", [5.0, 15.0, 30.0, 60.0], ids="gap{}".format)
def test_confident_tokens_keep_their_gradient(backend, gap):
    """1 - q of the target shrinks to 1e-26 here: the relative bound still holds."""
    for seed in range(effort(backend, 10)):
        case = make_case("linear_nll", shape=(1,), seed=seed, bias=True)
        case.options["bias"][case.targets] += gap
        check(case, *run(case, backend=backend))


@pytest.mark.long_interpreted
@each_backend_and_dtype
@each_loss
def test_no_rounding_shrinks_or_stretches_the_gradient(backend, loss, dtype):
    """What is cut off instead of rounded takes some of every number, 2^-8.5 of it in bf16."""
    case = make_case(
        loss, shape=(19,), width=192, vocabulary=effort(backend, 2053), dtype=dtype, distance=1.0
    )
    _, gradient = run(case, backend=backend)
    _, expected = oracle(case)
    stretch = float((gradient.double() * expected).sum() / expected.square().sum()) - 1
    assert abs(stretch) <= 2.0**-10


@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "streaming"])
@each_loss
@each_dtype
def test_a_gradient_is_rounded_to_the_dtype_of_the_inputs_once(backend, loss, dtype):
    """After the upstream gradient is applied: twice would exceed what the dtype costs anyway.

    The head is narrow: over a wide one a GPU multiplies 16-bit gradients by the logits. Streaming
    sums in tiles of another size for another dtype.
    """
    case = make_case(loss, dtype=dtype, reduction="none")
    token_loss, gradient = run(case, backend=backend)
    wide_loss, wide_gradient = run(case.to(torch.float32), backend=backend)
    assert torch.equal(token_loss, wide_loss)
    assert torch.equal(gradient, wide_gradient.to(dtype))


@each_backend_and_dtype
@each_loss
def test_one_entry_of_vocabulary_is_exactly_zero(backend, loss, dtype):
    case = make_case(loss, vocabulary=1, dtype=dtype, bias=True, reduction="none", softcap=5.0)
    for value in run(case, backend=backend):
        assert torch.equal(value, torch.zeros_like(value))


@each_backend_and_dtype
@each_beta
def test_identical_students_and_teachers_have_no_divergence(backend, beta, dtype):
    for spread in (0.5, 4.0):
        case = make_case(
            "linear_kl",
            vocabulary=effort(backend, 8209),
            dtype=dtype,
            beta=beta,
            spread=spread,
            distance=0.0,
        )
        head = case.weight.clone()  # another tensor with the same numbers
        loss, _ = run(case, backend=backend, reduction="none", teacher_weight=head, workspace_mib=8)
        assert loss.abs().max() <= 1e-6


@pytest.mark.long_interpreted
@each_backend
@each_beta
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4], ids="distance{}".format)
def test_a_small_divergence_is_not_lost_in_cancellation(backend, beta, distance):
    """Summed as p (log p - log q) it would be rounding noise of either sign.

    Logits that are off by e move KL by e sqrt(2 KL) only: the bound shrinks as sqrt(KL).
    """
    case = make_case("linear_kl", vocabulary=2053, distance=distance, beta=beta, reduction="none")
    loss, _ = run(case, backend=backend)
    expected, _ = oracle(case)
    assert expected.max() < 1e-3
    assert (loss > 0).all()
    assert ((loss - expected).abs() <= loss_bound(case) * (2 * expected).sqrt()).all()


@each_backend_and_dtype
@each_loss
def test_huge_logits(backend, loss, dtype):
    for beta in [None] if loss == "linear_nll" else [0.0, 0.3, 1.0]:
        options = {} if beta is None else {"beta": beta}
        case = make_case(loss, dtype=dtype, spread=3000.0, reduction="none", **options)
        logits = spf.reference.logits(case.hidden, case.weight)
        assert logits.max() > 8000
        assert logits.min() < -8000
        token_loss, gradient = run(case, backend=backend)
        assert token_loss.isfinite().all()
        assert gradient.isfinite().all()
        check(case, token_loss, gradient)


@each_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.5, 1.0])
def test_label_smoothing_up_to_uniform_targets(backend, label_smoothing):
    for vocabulary in (2, 131, effort(backend, 5003)):
        case = make_case(
            "linear_nll", vocabulary=vocabulary, label_smoothing=label_smoothing, softcap=5.0
        )
        check(case, *run(case, backend=backend))


@each_backend
@each_loss
@each_beta
def test_an_entry_at_minus_infinity_is_as_good_as_absent(backend, loss, beta):
    """Its probability is 0 for student and teacher alike."""
    options = {} if loss == "linear_nll" else {"beta": beta}
    case = make_case(loss, vocabulary=70, bias=True, temperature=1.25, reduction="none", **options)
    present = torch.ones(70, dtype=torch.bool)
    present[[0, 33, 69]] = False
    new_id = present.cumsum(0) - 1
    if loss != "linear_kl":
        case.targets[~present[case.targets]] = 1
    tensors = [case.weight[present], *case.tensors[1:]]
    if loss != "linear_kl":
        tensors[1] = new_id[case.targets]
    smaller = Case(
        loss=loss,
        hidden=case.hidden,
        tensors=tuple(tensors),
        options={**case.options, "bias": case.options["bias"][present]},
        upstream=case.upstream,
    )
    case.options["bias"][~present] = -torch.inf
    check(smaller, *run(case, backend=backend))


@each_backend
def test_a_target_at_minus_infinity_has_infinite_loss(backend):
    case = make_case("linear_nll", bias=True, reduction="none")
    case.options["bias"][case.targets[3]] = -torch.inf
    loss, gradient = run(case, backend=backend)
    assert torch.equal(loss.isposinf(), case.targets == case.targets[3])
    expected_loss, expected_gradient = oracle(case)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-5)


@each_backend
@each_beta
def test_underflow_in_both_distributions_contributes_nothing(backend, beta):
    """Entries 600 nats below the others: e^-600 is 0 in fp32, in p and q alike."""
    case = make_case("linear_kl", bias=True, beta=beta, reduction="none")
    case.options["bias"][::2] -= 600
    loss, gradient = run(case, backend=backend)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    check(case, loss, gradient)


@each_backend
@each_beta
def test_students_far_from_their_teacher(backend, beta):
    case = make_case("linear_kl", beta=beta, spread=12.0, distance=2.0, reduction="none")
    check(case, *run(case, backend=backend))


@each_backend
@each_beta
def test_a_student_that_rules_out_the_teachers_choice(backend, beta):
    """q underflows where p is 1 and the other way round: hundreds of nats for beta 0 and 1."""
    case = make_case("linear_kl", beta=beta, spread=200.0, distance=2.0, reduction="none")
    assert beta not in (0.0, 1.0) or oracle(case)[0].max() > 100
    check(case, *run(case, backend=backend))


@pytest.mark.long_interpreted
@each_backend
@each_beta
@pytest.mark.parametrize(
    "teacher", [{"distance": 0.3}, {"teacher_width": 5}], ids=["agrees", "disagrees"]
)
def test_a_confident_student_keeps_its_gradient(backend, beta, teacher):
    """One entry has nearly all of q: what is left of the others must not be lost beside it."""
    for seed in range(effort(backend, 60)):
        case = make_case(
            "linear_kl", seed=seed, beta=beta, shape=(1,), vocabulary=515, spread=12.0, **teacher
        )
        check(case, *run(case, backend=backend))


@each_backend
@each_beta
def test_alpha_0_is_nll_to_the_bit(backend, beta):
    case = make_case("linear_distill", spread=12.0, alpha=0.0, beta=beta, reduction="none")
    nll = make_case("linear_nll", spread=12.0, reduction="none")
    nll.hidden, nll.tensors, nll.upstream = case.hidden, case.tensors[:2], case.upstream
    for one, other in zip(run(case, backend=backend), run(nll, backend=backend), strict=True):
        assert torch.equal(one, other)


@each_backend
def test_the_teachers_bias_is_its_own_even_over_the_students_weight(backend):
    case = make_case("linear_kl", bias=True, teacher_width=24)
    case.options["teacher_weight"] = case.weight
    check(case, *run(case, backend=backend))


@each_backend
@pytest.mark.parametrize("kl", [4e-1, 4e-2, 4e-3], ids="KL{}".format)
def test_logits_rounded_to_bf16_would_be_caught(backend, kl):
    """The defect of several published kernels; at 4e-1 nats it costs 4.5 % of the gradient."""
    distance = (kl / 2) ** 0.5
    case = make_case(
        "linear_kl", shape=(16,), vocabulary=2053, dtype=torch.bfloat16, distance=distance
    )
    hidden = case.hidden.detach().requires_grad_()
    z, z_teacher = (rows @ case.weight.T for rows in (hidden, case.teacher))
    assert z.dtype == torch.bfloat16
    log_q, log_p = (logits.float().log_softmax(-1) for logits in (z, z_teacher))
    loss = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()
    (gradient,) = torch.autograd.grad(loss, hidden, case.upstream)
    expected_loss, _ = oracle(case)
    assert kl / 2 < expected_loss < kl * 2
    with pytest.raises(AssertionError, match="gradient: L2 error"):
        check(case, expected_loss.float(), gradient)
    check(case, *run(case, backend=backend))


def test_options_default_to_pytorchs_cross_entropy():
    case = make_case("linear_nll", shape=(4, 5), ignored=0.3)
    logits = case.hidden @ case.weight.T
    for reduction in ("mean", "sum", "none"):
        for label_smoothing in (0.0, 0.2):
            same = {"reduction": reduction, "label_smoothing": label_smoothing}
            expected = F.cross_entropy(logits.flatten(0, 1), case.targets.flatten(), **same)
            loss = spf.linear_nll(case.hidden, case.weight, case.targets, **same)
            torch.testing.assert_close(loss.flatten(), expected.flatten())


@pytest.mark.parametrize("ignore_index", [-100, -1, 7])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", ["nothing", "class weights", "smoothing", "bias"])
def test_linear_cross_entropy_equals_pytorchs(reduction, extra, ignore_index):
    case = make_case("linear_nll", shape=(20,), vocabulary=11, bias=True, reduction=reduction)
    targets = case.targets.clone()
    targets[::4] = ignore_index
    options = {"reduction": reduction, "ignore_index": ignore_index}
    bias = case.options["bias"] if extra == "bias" else None
    if extra == "class weights":
        options["weight"] = torch.rand(11, generator=torch.Generator().manual_seed(1))
    if extra == "smoothing":
        options["label_smoothing"] = 0.1
    hidden = case.hidden.requires_grad_()
    expected = F.cross_entropy(F.linear(hidden, case.weight, bias), targets, **options)
    loss = spf.linear_cross_entropy(hidden, case.weight, targets, linear_bias=bias, **options)
    torch.testing.assert_close(loss, expected)
    upstream = torch.linspace(-1, 2, loss.numel()).view(loss.shape)
    torch.testing.assert_close(
        torch.autograd.grad(loss, hidden, upstream), torch.autograd.grad(expected, hidden, upstream)
    )


def test_linear_cross_entropy_takes_a_single_token():
    case = make_case("linear_nll", shape=())
    expected = F.cross_entropy(case.weight @ case.hidden, case.targets)
    loss = spf.linear_cross_entropy(case.hidden, case.weight, case.targets)
    torch.testing.assert_close(loss, expected)


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this PyTorch has no linear_cross_entropy"
)
def test_linear_cross_entropy_has_pytorchs_signature():
    theirs = inspect.signature(F.linear_cross_entropy).parameters
    ours = inspect.signature(spf.linear_cross_entropy).parameters
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    assert {name: p.default for name, p in ours.items()} == {
        name: p.default for name, p in theirs.items()
    }


@each_backend
def test_modules_are_the_functions(backend):
    case = make_case("linear_nll", ignored=0.2, bias=True)
    options = {"temperature": 2.0, "backend": backend, "reduction": "sum"}
    module = spf.LinearNLLLoss(label_smoothing=0.1, **options)
    bias = case.options["bias"]
    assert torch.equal(
        module(case.hidden, case.weight, case.targets, bias=bias),
        spf.linear_nll(
            case.hidden, case.weight, case.targets, bias=bias, label_smoothing=0.1, **options
        ),
    )
    assert "temperature=2.0" in repr(module)

    case = make_case("linear_kl", ignored=0.2)
    module = spf.LinearKLLoss(beta=0.5, **options)
    labels = case.options["labels"]
    assert torch.equal(
        module(case.hidden, case.weight, case.teacher, labels=labels),
        spf.linear_kl(case.hidden, case.weight, case.teacher, labels=labels, beta=0.5, **options),
    )
    assert "beta=0.5" in repr(module)


@each_backend
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_that_counts_is_zero(backend, loss, reduction):
    case = make_case(loss, ignored=1.1, reduction=reduction, weighted=True)
    assert (case.targets == IGNORED).all()
    for value in run(case, backend=backend):
        assert torch.equal(value, torch.zeros_like(value))


@each_backend
@each_loss
def test_ignored_tokens_may_hold_anything(backend, loss):
    """A padded position is often uninitialised memory."""
    case = make_case(loss, shape=(12,), ignored=0.4)
    clean = run(case, backend=backend)
    case.hidden[case.targets == IGNORED] = torch.nan
    if case.teacher is not None:
        case.teacher[case.targets == IGNORED] = torch.inf
    for before, after in zip(clean, run(case, backend=backend), strict=True):
        assert torch.equal(before, after)


def test_all_losses_are_covered():
    assert set(LOSSES) == {name for name in spf.reference.__dict__ if name.startswith("linear_")}
