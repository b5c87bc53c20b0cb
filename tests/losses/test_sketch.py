"""A teacher sketch gives forward KL and its gradient exactly, on every backend, or refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from contract import (
    IGNORED,
    INTERPRETED,
    Case,
    cases,
    check,
    each_backend,
    each_backend_and_dtype,
    each_cpu_backend,
    effort,
    hold,
    make_case,
    moved_to,
    oracle,
    run,
    sketch_of,
    sketched,
)

import softprompt_fast as spf
from softprompt_fast import TeacherSketch, sketch_teacher
from softprompt_fast.backends.matmul import LEAST_16_BIT
from softprompt_fast.backends.problem import Head, Problem, SparseTarget, flatten
from softprompt_fast.losses.sketch import sparse_target

LOSSES = ("linear_kl", "linear_distill")
each_loss = pytest.mark.parametrize("loss", LOSSES)


def hold_contract(case: Case, backend: str, top_k: int = 32) -> None:
    check(case, *run(sketched(case, top_k), backend=backend))


# --- the numbers ---

CPP_MULTIPLIES_IN_BF16 = spf.backends.build_info()["instruction_set_bf16"].endswith("bf16")


def is_flat_in_16_bit(case: Case) -> bool:
    """16-bit products of flat probabilities need more entries: a law of its own, below."""
    scale = case.options.get("logit_scale", 1.0) / case.options.get("temperature", 1.0)
    is_wide = min(case.weight.shape) >= LEAST_16_BIT
    return case.hidden.dtype != torch.float32 and is_wide and scale < 0.3


@pytest.mark.long_interpreted
@each_backend
@each_loss
@pytest.mark.parametrize("top_k", [1, 5, 32], ids="k{}".format)
def test_a_sketch_is_as_good_as_hidden_states(backend, loss, top_k):
    linear = {"softcap": None, "teacher_width": None, "beta": 0.0, "spread": 4.0}
    problems = cases(loss, **linear).filter(lambda case: not is_flat_in_16_bit(case))
    hold(backend, problems, lambda case: sketched(case, top_k))


@each_backend_and_dtype
@pytest.mark.parametrize("kl", [1.0, 1e-1, 1e-2, 1e-3, 1e-4], ids="kl{:g}".format)
def test_the_contract_as_the_student_converges(backend, kl, dtype):
    for bias in (False, True):
        case = make_case(
            "linear_kl", shape=(17,), width=64, spread=4.0, distance=1.0, dtype=dtype, bias=bias
        )
        case = moved_to(case, kl)
        hold_contract(case, backend)


@each_backend_and_dtype
def test_identical_students_and_teachers_have_no_divergence(backend, dtype):
    for spread in (0.5, 4.0):
        case = make_case(
            "linear_kl",
            width=64,
            vocabulary=effort(backend, 8209),
            dtype=dtype,
            spread=spread,
            distance=0.0,
            bias=True,
        )
        loss, _ = run(sketched(case), backend=backend, reduction="none", workspace_mib=8)
        assert loss.abs().max() <= 1e-6


@each_backend
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 64, 131, 50257], ids="V{}".format)
def test_every_vocabulary(backend, vocabulary):
    if backend in INTERPRETED:
        vocabulary = min(vocabulary, 4500)
    for loss in LOSSES:
        case = make_case(loss, shape=(3,), vocabulary=vocabulary, spread=4.0, reduction="none")
        for top_k in (1, 64):
            hold_contract(case, backend, top_k)


@each_backend
def test_sixteen_bit_products_need_the_top_entries(backend):
    """Rounding q, and not q - p, costs more and more as q comes close to p."""
    case = make_case(
        "linear_kl", shape=(17,), width=64, spread=4.0, distance=0.01, dtype=torch.bfloat16
    )
    exact = oracle(case)[1]
    error = {}
    for top_k in (1, 131):
        _, gradient = run(sketched(case, top_k), backend=backend)
        error[top_k] = float((gradient - exact).norm() / exact.norm())
    assert error[131] < 0.003
    in_fp32 = backend == "torch" or (backend == "cpp" and not CPP_MULTIPLIES_IN_BF16)
    assert (error[1] < 0.003) == in_fp32


def test_the_fields_are_what_they_say():
    case = make_case("linear_kl", bias=True, temperature=1.5, logit_scale=0.7, shape=(2, 5))
    sketch = sketch_of(case, top_k=7)
    head = {name: case.options[name].double() for name in ["bias"]}
    head |= {"temperature": 1.5, "logit_scale": 0.7}
    weight = case.weight.double()
    p = spf.reference.logits(case.teacher.double(), weight, **head).softmax(-1)
    top, ids = p.topk(7)
    rest = p.scatter(-1, ids, 0.0)
    assert torch.equal(sketch.ids.long(), ids)
    for actual, expected in (
        (sketch.probs, top),
        (sketch.tail, rest.sum(-1)),
        (sketch.moment, rest @ weight),
        (sketch.tail_bias, rest @ head["bias"]),
        (sketch.entropy, torch.special.entr(p).sum(-1)),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


@each_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2], ids="smoothing{}".format)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0], ids="alpha{}".format)
def test_a_mixture_with_labels_inside_and_outside_of_the_top(backend, alpha, label_smoothing):
    case = make_case(
        "linear_distill", shape=(12,), spread=4.0, alpha=alpha, label_smoothing=label_smoothing
    )
    order = spf.reference.logits(case.teacher, case.weight).argsort(-1, descending=True)
    for row, rank in enumerate([0, 1, 7, 8, 9, 60] * 2):  # the teacher's first, listed, not listed
        case.targets[row] = order[row, rank]
    hold_contract(case.with_options(reduction="none"), backend, top_k=8)


@each_backend
def test_without_weight_on_the_teacher_it_is_nll(backend):
    case = make_case("linear_distill", alpha=0.0)
    nll = replace(case, loss="linear_nll", tensors=case.tensors[:2], options={})
    expected = run(nll, backend=backend)
    for actual, other in zip(run(sketched(case), backend=backend), expected, strict=True):
        assert torch.equal(actual, other)


@each_backend
def test_a_teacher_that_is_certain(backend):
    """p of its first entry is 1 in fp32: what q lacks there is the whole gradient."""
    case = make_case("linear_kl", shape=(5,), width=64, spread=60.0, distance=0.3, reduction="none")
    assert (sketch_of(case).probs[:, 0] == 1).any()
    hold_contract(case, backend)


@each_backend
def test_impossible_entries(backend):
    """-inf for teacher and student alike counts nothing; -inf for the student alone is infinite."""
    case = make_case("linear_kl", vocabulary=20, bias=True, spread=1.0, reduction="none")
    case.options["bias"][[0, 7, 19]] = -torch.inf
    loss, gradient = run(sketched(case), backend=backend)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    torch.testing.assert_close(loss.double(), oracle(case)[0], rtol=1e-4, atol=1e-5)

    for rank in (0, 1):  # the first entry is a case of its own
        sketch = sketch_of(case)
        student = case.with_options(bias=case.options["bias"].clone())
        student.options["bias"][sketch.ids[3, rank].long()] = -torch.inf
        student = replace(student, tensors=(case.weight, sketch))
        assert run(student, backend=backend)[0][3] == torch.inf


# --- tokens ---


@each_backend
@each_loss
def test_ignored_tokens_hold_anything(backend, loss):
    case = make_case(loss, shape=(2, 9), ignored=0.4, weighted=True, reduction="none")
    ignored = case.targets == IGNORED
    expected = run(sketched(case), backend=backend)
    spoilt = sketched(case)
    sketch = spoilt.tensors[-1]
    for value in (sketch.probs, sketch.tail, sketch.moment, sketch.entropy):
        value[ignored] = torch.nan
    sketch.ids[ignored] = -7
    spoilt.hidden[ignored] = torch.inf
    for actual, other in zip(run(spoilt, backend=backend), expected, strict=True):
        assert torch.equal(actual, other)
        assert not actual[ignored].any()


@each_cpu_backend
@each_loss
def test_rows_do_not_depend_on_their_batch(backend, loss):
    case = make_case(loss, shape=(21,), reduction="none", spread=4.0)
    case = sketched(case)
    loss_of, gradient = run(case, backend=backend)
    for rows in (slice(0, 1), slice(4, 11), torch.tensor([20, 3])):
        part_loss, part_gradient = run(case.rows(rows), backend=backend)
        assert torch.equal(part_loss, loss_of[rows])
        assert torch.equal(part_gradient, gradient[rows])


@each_backend
def test_a_bad_hidden_state_spoils_its_own_token_only(backend):
    case = sketched(make_case("linear_kl", shape=(9,), reduction="none"))
    expected, expected_gradient = run(case, backend=backend)
    case.hidden[4, 2] = torch.nan
    loss, gradient = run(case, backend=backend)
    good = torch.arange(9) != 4
    assert loss[4].isnan()
    assert gradient[4].isnan().any()
    assert torch.equal(loss[good], expected[good])
    assert torch.equal(gradient[good], expected_gradient[good])


def test_tokens_can_be_taken_and_joined():
    sketch = sketch_of(make_case("linear_kl", shape=(4, 5)))
    parts = [sketch[:1], sketch[1:3], sketch[3:]]
    joined = TeacherSketch.cat(parts)
    for name in ("ids", "probs", "tail", "moment", "tail_bias", "entropy"):
        assert torch.equal(getattr(joined, name), getattr(sketch, name))
    assert sketch[sketch.tail > 0].tail.shape == (20,)
    other = sketch_of(make_case("linear_kl", shape=(4, 5), temperature=2.0))
    with pytest.raises(ValueError, match=r"different temperature cannot be joined: 1.0 and 2.0"):
        TeacherSketch.cat([sketch, other])


def test_no_tokens():
    case = sketched(make_case("linear_kl", shape=(0,)))
    loss, gradient = run(case, backend="torch")
    assert loss == 0
    assert gradient.shape == (0, 24)


@pytest.mark.parametrize("workspace_mib", [0.1, 1, 256])
def test_sketching_in_chunks_changes_nothing(workspace_mib):
    case = make_case("linear_kl", shape=(45,), vocabulary=1000, bias=True)
    bias = {"bias": case.options["bias"]}
    whole = sketch_of(case)
    parts = sketch_teacher(case.teacher, case.weight, **bias, workspace_mib=workspace_mib)
    assert torch.equal(whole.ids, parts.ids)
    for name in ("probs", "tail", "moment", "tail_bias", "entropy"):
        ours, theirs = getattr(parts, name), getattr(whole, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


# --- around the op ---


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@each_loss
def test_compiled_equals_eager(backend, loss):
    case = sketched(make_case(loss, shape=(2, 7), ignored=0.3, bias=True))
    torch._dynamo.reset()
    function = torch.compile(getattr(spf, loss), fullgraph=True, backend="aot_eager")
    hidden = case.hidden.clone().requires_grad_()
    value = function(hidden, *case.tensors, **case.options, backend=backend)
    (gradient,) = torch.autograd.grad(value, hidden, case.upstream)
    for one, other in zip((value.detach(), gradient), run(case, backend=backend), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    case = sketched(make_case("linear_distill", ignored=0.3, dtype=dtype), top_k=5)
    target = sparse_target(case.tensors[-1], SparseTarget(case.targets, smoothing=0.1), alpha=0.5)
    problem = Problem(case.hidden, Head(case.weight), target, keep=case.targets != IGNORED)
    arguments = (*flatten(problem), backend)
    torch.library.opcheck(torch.ops.softprompt_fast.token_loss.default, arguments)


# --- what is refused ---


def refuses(error: type[Exception], text: str, case: Case, **options: Any) -> None:
    with pytest.raises(error, match=text):
        run(case, **{"backend": "torch", **options})


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"beta": 0.5}, "forward KL only: got beta=0.5"),
        ({"beta": 1.0}, "forward KL only: got beta=1.0"),
        ({"softcap": 30.0}, "needs a linear head: got softcap=30.0"),
        ({"temperature": 2.0}, r"made with temperature=1.0: got temperature=2.0"),
        ({"logit_scale": 0.5}, r"made with logit_scale=1.0: got logit_scale=0.5"),
        ({"teacher_weight": torch.ones(131, 24)}, "takes no teacher_weight"),
    ],
)
def test_where_it_is_not_exact_it_says_to_keep_hidden_states(option, text):
    case = sketched(make_case("linear_kl"))
    refuses(ValueError, f"{text}.*Keep the teacher's hidden states", case, **option)


def changed(case: Case, **fields: Any) -> Case:
    return replace(case, tensors=(*case.tensors[:-1], replace(case.tensors[-1], **fields)))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_entries_that_are_none(backend):
    case = sketched(make_case("linear_kl", shape=(2, 3)), top_k=4)
    sketch = case.tensors[-1]
    for value in (131, -1, 2**31 - 1):
        for column in (0, 2):
            ids = sketch.ids.clone()
            ids[1, 0, column] = value
            text = rf"token 3: the id {value} is outside the vocabulary.* in \[0, 131\)"
            refuses(IndexError, text, changed(case, ids=ids), backend=backend)
    ids = sketch.ids.clone()
    ids[0, 1, 3] = ids[0, 1, 0]
    text = rf"token 1: the sketch's ids hold {ids[0, 1, 0]} twice"
    refuses(ValueError, text, changed(case, ids=ids), backend=backend)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, torch.nan, torch.inf])
def test_probabilities_that_are_none(wrong):
    case = sketched(make_case("linear_kl"), top_k=4)
    probs = case.tensors[-1].probs.clone()
    probs[5, 2] = wrong
    refuses(ValueError, "token 5: the sketch is no distribution", changed(case, probs=probs))


def test_a_label_outside_the_vocabulary():
    for value in (-1, 131):
        case = make_case("linear_distill")
        case.targets[2] = value
        text = rf"token 2: the id {value} is outside the vocabulary"
        refuses(IndexError, text, sketched(case))


def test_shapes_that_do_not_fit():
    case = sketched(make_case("linear_kl"), top_k=4)
    sketch = case.tensors[-1]
    other = replace(case, tensors=(case.weight, sketch[:5]))
    refuses(ValueError, r"a sketch of \(5,\) against \(9, 24\)", other)
    narrow = replace(case, hidden=case.hidden[:, :7], tensors=(case.weight[:, :7], sketch))
    refuses(ValueError, r"hidden width D: \(9, 24\) against \(131, 7\)", narrow)
    short = replace(case, tensors=(case.weight[:3], sketch))
    refuses(ValueError, "has 4 entries a token: weight has only 3", short)
    with pytest.raises(ValueError, match=r"the sketch's moment must have shape .*got \(8, 24\)"):
        replace(sketch, moment=sketch.moment[:8])
    with pytest.raises(ValueError, match=r"the sketch's probs must have the shape of ids"):
        replace(sketch, probs=sketch.probs[:, :3])
    with pytest.raises(TypeError, match=r"the sketch's ids must be a constant torch.int32"):
        replace(sketch, ids=sketch.ids.long())
    with pytest.raises(TypeError, match="moment must be a constant torch.float32: got .*bfloat16"):
        replace(sketch, moment=sketch.moment.bfloat16())


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_sketch_has_an_entry(top_k):
    with pytest.raises(ValueError, match=f"top_k must be at least 1: got {top_k}"):
        sketch_of(make_case("linear_kl"), top_k)
