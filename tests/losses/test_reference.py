"""The oracle itself: PyTorch's own losses on materialised logits, first and second derivative."""

from __future__ import annotations

import math

import pytest
import torch
from contract import IGNORED, make_case
from torch.nn import functional as F

import softprompt_fast as spf

reference = spf.reference
HEADS = [
    {},
    {"temperature": 0.7, "logit_scale": 1.3},
    {"softcap": 2.0},
    {"softcap": 5.0, "logit_scale": 0.4, "temperature": 2.0},
]
each_head = pytest.mark.parametrize("head", HEADS, ids=lambda head: "-".join(head) or "plain")
each_beta = pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0], ids="beta{}".format)


def double_case(loss, **options):
    case = make_case(
        loss, shape=(2, 2), width=3, vocabulary=5, bias=True, weighted=True, ignored=0.3, **options
    )
    return case.double()


def value_and_gradient(case):
    hidden = case.hidden.clone().requires_grad_()
    loss = getattr(reference, case.loss)(hidden, *case.tensors, **case.options)
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.detach(), gradient


def gradcheck(case, loss):
    """Numerical first and second derivatives by hidden."""
    options = case.options

    def of_hidden(hidden):
        return loss(hidden, *case.tensors, **options)

    hidden = case.hidden.requires_grad_()
    assert torch.autograd.gradcheck(of_hidden, hidden)
    assert torch.autograd.gradgradcheck(of_hidden, hidden)


@each_head
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_nll_gradients(head, label_smoothing):
    case = double_case("linear_nll", label_smoothing=label_smoothing, **head)
    gradcheck(case, reference.linear_nll)


@each_head
@each_beta
def test_kl_gradients(head, beta):
    own = 4 if beta == 0.5 else None
    case = double_case("linear_kl", beta=beta, teacher_width=own, **head)
    gradcheck(case, reference.linear_kl)


@each_beta
def test_distill_gradients(beta):
    case = double_case("linear_distill", beta=beta, alpha=0.3, label_smoothing=0.1, softcap=3.0)
    gradcheck(case, reference.linear_distill)


def by_hand(case):
    """[..., V] logits, one operation at a time."""
    head = case.options
    z = case.hidden @ case.weight.T
    if head.get("bias") is not None:
        z = z + head["bias"]
    z = z * head.get("logit_scale", 1.0)
    if head.get("softcap") is not None:
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    return z / head.get("temperature", 1.0)


@each_head
def test_logits_are_scaled_then_capped_then_tempered(head):
    case = make_case("linear_nll", bias=True, **head).double()
    logits = reference.logits(case.hidden, case.weight, **case.options)
    torch.testing.assert_close(logits, by_hand(case))
    largest = head.get("softcap", math.inf) / head.get("temperature", 1.0)
    assert logits.abs().max() <= largest


@each_head
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nll_is_cross_entropy(head, label_smoothing, reduction):
    case = make_case("linear_nll", shape=(2, 7), bias=True, ignored=0.3, **head).double()
    logits, targets = by_hand(case).flatten(0, 1), case.targets.flatten()
    expected = F.cross_entropy(
        logits, targets, label_smoothing=label_smoothing, reduction=reduction
    )
    loss = reference.linear_nll(
        case.hidden,
        case.weight,
        case.targets,
        label_smoothing=label_smoothing,
        reduction=reduction,
        **case.options,
    )
    torch.testing.assert_close(loss.flatten(), expected.flatten())


@each_head
@each_beta
def test_kl_is_kl_div(head, beta):
    case = make_case("linear_kl", bias=True, **head).double()
    q = by_hand(case).softmax(-1)
    case.hidden, hidden = case.teacher, case.hidden
    p = by_hand(case).softmax(-1)

    def kl(a, b):
        return F.kl_div(b.log(), a, reduction="batchmean")

    m = beta * p + (1 - beta) * q
    expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
    loss = reference.linear_kl(hidden, case.weight, case.teacher, beta=beta, **case.options)
    torch.testing.assert_close(loss, expected)


def test_jensen_shannon_of_disjoint_distributions_is_log_two():
    head = 200 * torch.eye(4, dtype=torch.float64)
    loss = reference.linear_kl(head[:2] / 200, head, head[2:] / 200, beta=0.5)
    torch.testing.assert_close(loss, torch.tensor(math.log(2), dtype=torch.float64))


def test_divergences_ignore_an_entry_at_minus_infinity():
    case = make_case("linear_kl", bias=True).double()
    bias = case.options["bias"]
    for beta in (0.0, 0.3, 1.0):
        expected = reference.linear_kl(
            case.hidden, case.weight[1:], case.teacher, bias=bias[1:], beta=beta
        )
        without = torch.cat([bias.new_full((1,), -torch.inf), bias[1:]])
        loss = reference.linear_kl(case.hidden, case.weight, case.teacher, bias=without, beta=beta)
        torch.testing.assert_close(loss, expected)


@each_beta
@pytest.mark.parametrize("absent", ["bias", "teacher_bias"])
def test_an_entry_that_only_one_side_cannot_give(absent, beta):
    """0 log(0 / q) is 0, and p log(p / 0) infinite; Jensen-Shannon is always finite."""
    case = make_case("linear_kl", bias=True, teacher_width=5, beta=beta).double()
    case.options[absent][3] = -torch.inf
    loss, gradient = value_and_gradient(case)
    infinite = beta == (0.0 if absent == "bias" else 1.0)
    assert loss.isposinf() if infinite else loss.isfinite()
    # what only tends to 0 must tend there
    case.options[absent][3] = -500.0
    near, near_gradient = value_and_gradient(case)
    if not infinite:
        torch.testing.assert_close(loss, near)
    if not infinite or beta == 0.0:
        torch.testing.assert_close(gradient, near_gradient)


@pytest.mark.parametrize("alpha", [0, 1])
def test_distill_drops_a_term_without_weight(alpha):
    case = make_case("linear_distill", bias=True, teacher_width=5, alpha=alpha).double()
    case.targets[case.targets == 3] = 4
    if alpha:  # the likelihood is infinite, for the teacher gives no first target either
        case.options["bias"][case.targets[0]] = -torch.inf
        case.options["teacher_bias"][case.targets[0]] = -torch.inf
    else:  # the divergence is
        case.options["bias"][3] = -torch.inf
    loss, gradient = value_and_gradient(case)
    assert loss.isfinite() and gradient.isfinite().all()


def test_distill_is_the_sum_of_its_terms():
    case = double_case("linear_distill", beta=0.3, label_smoothing=0.1)
    options = dict(case.options)
    beta, label_smoothing = options.pop("beta"), options.pop("label_smoothing")
    weight, targets, teacher = case.tensors
    kl = reference.linear_kl(case.hidden, weight, teacher, labels=targets, beta=beta, **options)
    nll = reference.linear_nll(
        case.hidden, weight, targets, label_smoothing=label_smoothing, **options
    )
    loss = reference.linear_distill(case.hidden, *case.tensors, alpha=0.25, **case.options)
    torch.testing.assert_close(loss, 0.25 * kl + 0.75 * nll)


def test_the_mean_is_over_the_weight_that_counts():
    case = double_case("linear_nll", reduction="none")
    token_loss = reference.linear_nll(case.hidden, *case.tensors, **case.options)
    weight = case.options["token_weight"][case.targets != IGNORED]
    case.options["reduction"] = "mean"
    mean = reference.linear_nll(case.hidden, *case.tensors, **case.options)
    torch.testing.assert_close(mean, token_loss.sum() / weight.sum())


def test_a_single_token_and_none_at_all():
    for loss in ("linear_nll", "linear_kl", "linear_distill"):
        case = make_case(loss, shape=()).double()
        one = getattr(reference, loss)(case.hidden, *case.tensors)
        batch = [value.unsqueeze(0) for value in (case.hidden, *case.tensors[1:])]
        hidden, *others = batch
        torch.testing.assert_close(getattr(reference, loss)(hidden, case.weight, *others), one)
        case = make_case(loss, shape=(0,)).double()
        assert getattr(reference, loss)(case.hidden, *case.tensors) == 0


def test_low_precision_is_computed_in_float32():
    case = make_case("linear_nll", dtype=torch.bfloat16)
    loss = reference.linear_nll(case.hidden, *case.tensors)
    assert loss.dtype == torch.float32
    expected = reference.linear_nll(case.hidden.float(), case.weight.float(), case.targets)
    assert torch.equal(loss, expected)


def test_a_label_outside_the_vocabulary():
    case = make_case("linear_nll", shape=(2, 3), vocabulary=7)
    case.targets[1, 2] = 7
    with pytest.raises(IndexError, match=r"target at \[1, 2\] is 7: .* \[0, 7\)"):
        reference.linear_nll(case.hidden, *case.tensors)
