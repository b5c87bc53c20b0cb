"""What is wrong with an input is said by name, value and remedy; what is merely odd works."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from contract import (
    IGNORED,
    LOSSES,
    Case,
    check,
    each_cpu_backend,
    each_dtype,
    each_loss,
    make_case,
    run,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import softprompt_fast as spf
from softprompt_fast.backends import registry


def call(case: Case, **options) -> torch.Tensor:
    return getattr(spf, case.loss)(case.hidden, *case.tensors, **{**case.options, **options})


def refuses(error, text, case: Case, **options):
    """``text`` is a regular expression."""
    with pytest.raises(error, match=text):
        call(case, **options)


def replaced(case: Case, position: int, value) -> Case:
    """The case with another of ``tensors``: 0 is the weight, then targets or teacher."""
    tensors = list(case.tensors)
    tensors[position] = value
    return Case(loss=case.loss, hidden=case.hidden, tensors=tuple(tensors), options=case.options)


# --- labels ---


@each_cpu_backend
@pytest.mark.parametrize("loss", ["linear_nll", "linear_distill"])
@pytest.mark.parametrize("label", [131, 10**12, -1, -101])
def test_a_label_outside_the_vocabulary_is_named(backend, loss, label):
    case = make_case(loss, vocabulary=131)
    case.targets[4] = label
    case.targets[7] = IGNORED
    text = (
        rf"the target at \[4\] is {label}: a token id must be in \[0, 131\) or equal ignore_index"
    )
    refuses(IndexError, text, case, backend=backend)


def test_the_position_of_a_label_is_the_callers():
    case = make_case("linear_nll", shape=(2, 5))
    case.targets[1, 2] = 131
    refuses(IndexError, r"target at \[1, 2\] is 131", case)


@each_cpu_backend
def test_ignore_index_may_lie_in_the_vocabulary(backend):
    case = make_case("linear_nll", ignore_index=3)
    case.targets[[0, 5]] = 3
    case.targets[2] = -100
    refuses(IndexError, r"target at \[2\] is -100", case, backend=backend)
    case.targets[2] = 7
    check(case, *run(case, backend=backend))


@each_cpu_backend
@each_loss
def test_int32_labels_are_fine(backend, loss):
    case = make_case(loss, ignored=0.3)
    expected = call(case, backend=backend)
    if loss == "linear_kl":
        case.options["labels"] = case.options["labels"].int()
    else:
        case = replaced(case, 1, case.targets.int())
    assert torch.equal(call(case, backend=backend), expected)


@pytest.mark.parametrize("labels", [torch.zeros(9), torch.zeros(9, dtype=torch.int16), [0] * 9])
def test_labels_of_another_type(labels):
    got = re.escape(str(getattr(labels, "dtype", "list")))
    nll, kl = make_case("linear_nll"), make_case("linear_kl")
    refuses(TypeError, f"targets must be an int64 or int32.*{got}", replaced(nll, 1, labels))
    refuses(TypeError, f"labels must be an int64 or int32.*{got}", kl, labels=labels)


@pytest.mark.parametrize("shape", [(), (8,), (9, 1), (3, 3)], ids=str)
def test_labels_and_token_weights_of_another_shape(shape):
    labels, got = torch.zeros(shape, dtype=torch.long), re.escape(str(shape))
    nll, kl = make_case("linear_nll"), make_case("linear_kl")
    text = rf"must have one entry per token, shape \(9,\): got {got}"
    refuses(ValueError, f"targets {text}", replaced(nll, 1, labels))
    refuses(ValueError, f"labels {text}", kl, labels=labels)
    refuses(ValueError, f"token_weight {text}", nll, token_weight=labels.float())


def test_token_weights_are_constant_floats():
    case = make_case("linear_nll")
    refuses(TypeError, "token_weight must be .*int64", case, token_weight=torch.ones(9).long())
    weight = torch.ones(9, requires_grad=True)
    refuses(
        ValueError, "token_weight must be constant: got requires_grad", case, token_weight=weight
    )


@pytest.mark.long_interpreted
@each_cpu_backend
@each_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_weight_of_an_ignored_token_is_not_looked_at(backend, loss, value):
    case = make_case(loss, ignored=0.5, weighted=True)
    ignored, weight = case.targets == IGNORED, case.options["token_weight"]
    assert 0 < ignored.sum() < 9
    for reduction in ("mean", "sum", "none"):
        expected = run(case, backend=backend, reduction=reduction)
        odd = weight.masked_fill(ignored, value)
        actual = run(case, backend=backend, reduction=reduction, token_weight=odd)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)


@each_cpu_backend
def test_weights_that_cancel_are_not_weights_of_nothing(backend):
    """The mean is PyTorch's, the sum divided by 0; it is not the sum."""
    case = make_case("linear_nll", shape=(2,))
    assert call(case, backend=backend, token_weight=torch.tensor([1.0, -1.0])).isinf()
    assert call(case, backend=backend, token_weight=torch.zeros(2)) == 0


@each_cpu_backend
@pytest.mark.parametrize("alpha", [0, 1])
def test_a_term_without_weight_may_be_infinite(backend, alpha):
    """0 * inf would be NaN."""
    case = make_case("linear_distill", bias=True, teacher_width=24, alpha=alpha)
    case.targets[case.targets == 3] = 4
    if alpha:  # no teacher gives the first target either
        case.options["bias"][case.targets[0]] = -torch.inf
        case.options["teacher_bias"][case.targets[0]] = -torch.inf
    else:
        case.options["bias"][3] = -torch.inf
    loss, gradient = run(case, backend=backend)
    assert loss.isfinite()
    check(case, loss, gradient)


# --- shapes and dtypes ---


@each_cpu_backend
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_tokens_at_all(backend, loss, reduction, shape):
    case = make_case(loss, shape=shape, bias=True)
    value, gradient = run(case, backend=backend, reduction=reduction)
    assert value.shape == (shape if reduction == "none" else ())
    assert (value == 0).all()
    assert gradient.shape == case.hidden.shape


@each_loss
def test_a_head_of_another_width(loss):
    case = make_case(loss, width=24)
    head = torch.zeros(131, 25)
    text = r"hidden and weight disagree on the hidden width D: \(9, 24\) against \(131, 25\)"
    refuses(ValueError, text, replaced(case, 0, head))


def test_heads_that_are_no_matrix_or_empty():
    case = make_case("linear_nll")
    refuses(
        ValueError,
        r"weight must have shape \[V, D\].*: got \(24,\)",
        replaced(case, 0, torch.ones(24)),
    )
    text = r"weight must have shape \[V, D\], neither of them 0: got"
    refuses(ValueError, rf"{text} \(0, 24\)", replaced(case, 0, torch.ones(0, 24)))
    no_width = replaced(case, 0, torch.ones(131, 0))
    no_width.hidden = torch.ones(9, 0)
    refuses(ValueError, rf"{text} \(131, 0\)", no_width)
    kl = replaced(make_case("linear_kl"), 1, torch.ones(9, 0))
    refuses(ValueError, rf"teacher_{text} \(131, 0\)", kl, teacher_weight=torch.ones(131, 0))
    text = r"bias must have shape \[V\] = \[131\] like weight: got \(130,\)"
    refuses(ValueError, text, case, bias=torch.zeros(130))
    case.hidden = torch.tensor(1.0)
    refuses(ValueError, r"hidden must have shape \[\.\.\., D\]|one entry per token", case)


def test_teachers_that_do_not_fit():
    case = make_case("linear_kl")
    other = replaced(case, 1, torch.zeros(8, 24))
    text = r"teacher and hidden disagree on tokens: \(8, 24\) against \(9, 24\)"
    refuses(ValueError, text, other)
    text = r"teacher and weight disagree on the hidden width D: \(9, 25\) against \(131, 24\)"
    refuses(ValueError, text, replaced(case, 1, torch.zeros(9, 25)))
    text = r"teacher and teacher_weight disagree .*: \(9, 24\) against \(131, 30\)"
    refuses(ValueError, text, case, teacher_weight=torch.zeros(131, 30))
    text = "teacher_weight and weight must share one vocabulary: got 130 and 131"
    refuses(ValueError, text, case, teacher_weight=torch.zeros(130, 24))
    refuses(
        ValueError, "teacher_bias .*without teacher_weight", case, teacher_bias=torch.zeros(131)
    )
    refuses(
        TypeError, "teacher must be a tensor of hidden states.*: got str", replaced(case, 1, "h")
    )
    case.teacher.requires_grad_()
    refuses(ValueError, "teacher must be constant: got requires_grad=True", case)


def test_mixed_dtypes_need_autocast():
    case = make_case("linear_kl", dtype=torch.bfloat16, bias=True)
    text = "is torch.float32 but weight is torch.bfloat16: cast one of them"
    wide = replaced(case, 1, case.teacher.float())
    refuses(TypeError, f"teacher {text}, or run under torch.autocast", wide)
    wide.hidden = case.hidden.float()
    refuses(TypeError, f"hidden {text}, or run under torch.autocast", wide)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            refuses(TypeError, rf"bias {text}\.", case, bias=case.options["bias"].float())
            other = case.weight.float()
            refuses(TypeError, rf"teacher_weight {text}\.", case, teacher_weight=other)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
def test_dtypes_that_are_not_computed_here(dtype, autocast):
    case = make_case("linear_kl")
    text = f"must be float32, bfloat16 or float16: got {dtype}"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        refuses(TypeError, f"weight {text}", replaced(case, 0, case.weight.to(dtype)))
        refuses(TypeError, f"teacher {text}", replaced(case, 1, case.teacher.to(dtype)))
        case.hidden = case.hidden.to(dtype)
        refuses(TypeError, f"hidden {text}", case)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda tensor: tensor.tolist(), "must be a tensor.*: got list"),
        (lambda tensor: tensor.to_sparse(), "must be a dense tensor: got a torch.sparse_coo one"),
        (
            lambda tensor: torch.nested.nested_tensor(list(tensor), layout=torch.jagged),
            "must be a dense tensor: got a nested one",
        ),
    ],
    ids=["list", "sparse", "nested"],
)
def test_what_is_no_dense_tensor(wrong, text):
    case = make_case("linear_kl", bias=True, weighted=True, teacher_width=24)
    refuses(TypeError, f"weight {text}", replaced(case, 0, wrong(case.weight)))
    refuses(TypeError, f"teacher {text}", replaced(case, 1, wrong(case.teacher)))
    refuses(TypeError, f"teacher_weight {text}", case, teacher_weight=wrong(case.weight))
    if "nested" not in text:
        for name in ("bias", "teacher_bias", "token_weight"):
            refuses(TypeError, f"{name} {text}", case, **{name: wrong(case.options[name])})
        labels = torch.zeros(9, dtype=torch.long)
        refuses(TypeError, "labels must be ", case, labels=wrong(labels))
    case.hidden = wrong(case.hidden)
    refuses(TypeError, f"hidden {text}", case)


@each_loss
def test_on_meta_only_shapes_are_computed(loss):
    case = make_case(loss, shape=(2, 5), reduction="none")
    case.hidden = case.hidden.to("meta").requires_grad_()
    case.tensors = tuple(value.to("meta") for value in case.tensors)
    value = call(case)
    assert value.is_meta and value.shape == (2, 5)
    value.sum().backward()
    assert case.hidden.grad.shape == case.hidden.shape


def test_mixed_devices_are_named():
    case = make_case("linear_kl", bias=True)
    text = "is on meta but the hidden states are on cpu"
    refuses(ValueError, f"weight {text}", replaced(case, 0, case.weight.to("meta")))
    refuses(ValueError, f"teacher {text}", replaced(case, 1, case.teacher.to("meta")))
    refuses(ValueError, f"bias {text}", case, bias=case.options["bias"].to("meta"))
    labels = torch.zeros(9, dtype=torch.long, device="meta")
    refuses(ValueError, f"labels {text}", case, labels=labels)


# --- numbers and names ---

NORMAL = "in float32's range, 1.2e-38 to 3.4e+38"
UNUSABLE = (float("nan"), float("inf"), 1e39, 1e-39, 1e-46)


@each_loss
@pytest.mark.parametrize(
    ("option", "values", "text"),
    [
        ("temperature", (0.0, -1.0, *UNUSABLE), f"above 0 and {NORMAL}"),
        ("softcap", (0.0, -30.0, *UNUSABLE), f"None, or above 0 and {NORMAL}"),
        ("logit_scale", UNUSABLE, f"0, or its magnitude {NORMAL}"),
        ("workspace_mib", (0, -1, *UNUSABLE, 1e308), f"above 0 and {NORMAL}"),
        ("ignore_index", (2**63,), "an int64"),
        ("reduction", ("avg", "MEAN"), "one of mean, sum, none"),
        ("backend", ("fastest",), "auto, torch, cpp, triton, cuda, streaming"),
    ],
)
def test_options_out_of_range(loss, option, values, text):
    for value in values:
        text_ = re.escape(f"{option} must be {text}: got {value!r}")
        refuses(ValueError, text_, make_case(loss), **{option: value})


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_fractions_out_of_range(value):
    for loss, options in {
        "linear_nll": ["label_smoothing"],
        "linear_kl": ["beta"],
        "linear_distill": ["label_smoothing", "beta", "alpha"],
    }.items():
        for option in options:
            text = rf"{option} must be in \[0, 1\]: got {value}"
            refuses(ValueError, text, make_case(loss), **{option: value})


@each_loss
@pytest.mark.parametrize("value", [torch.tensor(1.0, requires_grad=True), "1", True], ids=repr)
def test_options_that_are_no_numbers(loss, value):
    """A tensor would be taken for its value, and its gradient lost."""
    options = ["softcap", "logit_scale", "temperature", "workspace_mib"]
    options += [] if loss == "linear_kl" else ["label_smoothing"]
    options += [] if loss == "linear_nll" else ["beta"]
    options += ["alpha"] if loss == "linear_distill" else []
    kind = type(value).__name__
    for option in options:
        text = f"{option} must be an int or a float: got {kind} "
        refuses(TypeError, re.escape(text), make_case(loss), **{option: value})
    for wrong in (value, 1.5, None):
        text = f"ignore_index must be an int: got {type(wrong).__name__} "
        refuses(TypeError, text, make_case(loss), ignore_index=wrong)


def test_none_is_no_alpha():
    """Without one there would be no teacher."""
    text = "alpha must be an int or a float: got NoneType None"
    refuses(TypeError, text, make_case("linear_distill"), alpha=None)


@each_cpu_backend
def test_numpy_numbers_are_numbers(backend):
    case = make_case("linear_distill", ignored=0.3)
    expected = call(case, backend=backend, temperature=1.5, logit_scale=0.5, alpha=1, beta=0.0)
    options = {"temperature": np.float32(1.5), "logit_scale": np.float16(0.5), "alpha": np.int64(1)}
    options |= {"beta": np.float64(0), "ignore_index": np.int32(IGNORED)}
    assert torch.equal(call(case, backend=backend, **options), expected)


@each_loss
def test_an_unknown_option_is_named(loss):
    refuses(TypeError, "unexpected keyword argument 'temprature'", make_case(loss), temprature=2.0)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.setitem(registry._PROBLEMS, "cuda", lambda: "no GPU was found")
    text = "backend 'cuda' cannot be used: no GPU was found"
    refuses(RuntimeError, text, make_case("linear_nll"), backend="cuda")


# --- autograd ---

# What is around the op is the same for every backend; these two are fast.
each_host_backend = pytest.mark.parametrize("backend", ["torch", "cpp"])


@each_loss
def test_a_head_that_trains_is_refused(loss):
    case = make_case(loss, bias=True, teacher_width=24 if loss != "linear_nll" else None)
    text = r"must be frozen: got requires_grad=True, shape \(131.*requires_grad_\(False\)"
    for name in ("bias", "teacher_weight", "teacher_bias"):
        if name in case.options:
            trained = case.options[name].clone().requires_grad_()
            refuses(ValueError, f"{name} {text}", case, **{name: trained})
    case.weight.requires_grad_()
    refuses(ValueError, f"weight {text}", case)


@each_host_backend
@each_loss
@each_dtype
def test_inputs_are_never_mutated_and_the_head_gets_no_gradient(backend, loss, dtype):
    own = None if loss == "linear_nll" else 24
    case = make_case(loss, dtype=dtype, bias=True, weighted=True, ignored=0.3, teacher_width=own)
    tensors = [case.hidden, *case.tensors, *case.options.values()]
    tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
    copies, versions = [value.clone() for value in tensors], [value._version for value in tensors]
    case.hidden.requires_grad_()
    call(case, backend=backend).backward()
    assert [value._version for value in tensors] == versions
    for value, copy in zip(tensors, copies, strict=True):
        assert torch.equal(value, copy)
    assert case.hidden.grad is not None
    assert all(value.grad is None for value in tensors[1:])


@each_host_backend
@each_loss
def test_the_graph_may_be_used_twice(backend, loss):
    case = make_case(loss)
    hidden = case.hidden.requires_grad_()
    loss_ = call(case, backend=backend)
    loss_.backward(retain_graph=True)
    once = hidden.grad.clone()
    loss_.backward()
    assert torch.equal(hidden.grad, 2 * once)
    assert once.abs().sum() > 0


@each_host_backend
@each_loss
def test_a_non_uniform_upstream_gradient_is_each_tokens_own(backend, loss):
    case = make_case(loss, reduction="none")
    hidden = case.hidden.requires_grad_()
    token_loss = call(case, backend=backend)
    (uniform,) = torch.autograd.grad(token_loss.sum(), hidden, retain_graph=True)
    upstream = torch.tensor([0.0, 1.0, -2.0, 1e-20, 1e20, 0.5, 3.0, 0.1, -0.0])
    (gradient,) = torch.autograd.grad(token_loss, hidden, upstream)
    assert torch.equal(gradient, uniform * upstream[:, None])


@each_host_backend
@each_loss
def test_accumulation_by_the_global_token_count(backend, loss):
    """Micro-batches summed and divided by all tokens that count are the one big batch."""
    case = make_case(loss, shape=(30,), ignored=0.3)
    expected = run(case.with_options(), backend=backend)[1] / case.upstream
    count = (case.targets != IGNORED).sum()
    parts = []
    for rows in (slice(0, 4), slice(4, 21), slice(21, 30)):
        case.upstream = torch.ones(30)
        part = case.rows(rows)
        part.upstream = 1 / count
        parts.append(run(part, backend=backend, reduction="sum")[1])
    torch.testing.assert_close(torch.cat(parts), expected)


@each_host_backend
@each_loss
def test_a_second_derivative_is_refused(backend, loss):
    case = make_case(loss)
    hidden = case.hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(call(case, backend=backend), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*softprompt_fast.reference"):
        torch.autograd.grad(gradient.sum(), hidden)


@each_host_backend
@each_loss
@pytest.mark.parametrize(
    "mix",
    [
        lambda loss, hidden: loss + hidden.square().sum(),
        lambda loss, hidden: loss * hidden.sum(),
        lambda loss, hidden: loss.square(),
        lambda loss, hidden: loss.exp() + hidden.sin().sum(),
    ],
    ids=["plus", "times", "squared", "exp"],
)
def test_a_second_derivative_through_another_loss_is_refused(backend, loss, mix):
    """A gradient penalty: without the refusal the loss's own curvature would silently be 0."""
    case = make_case(loss)
    hidden = case.hidden.requires_grad_()
    total = mix(call(case, backend=backend), hidden)
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (total + gradient.square().sum()).backward()


@each_host_backend
@each_loss
def test_a_forward_mode_derivative_is_refused(backend, loss):
    """The op has none, and PyTorch would take it for 0."""
    own = None if loss == "linear_nll" else 24
    case = make_case(loss, bias=True, weighted=True, teacher_width=own)
    text = "no forward-mode derivative: {} carries a tangent.*softprompt_fast.reference"
    with pytest.raises(RuntimeError, match=text.format("hidden")):
        torch.func.jvp(
            lambda hidden: getattr(spf, loss)(hidden, *case.tensors, backend=backend),
            (case.hidden,),
            (case.hidden,),
        )
    with forward_ad.dual_level():
        call(case, backend=backend)
        options = [name for name, value in case.options.items() if isinstance(value, torch.Tensor)]
        for name in options:
            dual = forward_ad.make_dual(case.options[name], case.options[name])
            refuses(RuntimeError, text.format(name), case, backend=backend, **{name: dual})
        for position, name in ((0, "weight"), (-1, "teacher")):
            if name == "weight" or loss != "linear_nll":
                value = case.tensors[position]
                other = replaced(case, position, forward_ad.make_dual(value, value))
                refuses(RuntimeError, text.format(name), other, backend=backend)


@each_host_backend
def test_a_tangent_of_the_upstream_gradient_is_refused(backend):
    case = make_case("linear_nll")
    case.hidden.requires_grad_()
    loss = call(case, backend=backend)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="the upstream gradient"):
        upstream = forward_ad.make_dual(torch.ones(()), torch.ones(()))
        torch.autograd.grad(loss, case.hidden, upstream)


class OpOutputs(TorchDispatchMode):
    """Keeps what softprompt_fast::token_loss returns."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.softprompt_fast.token_loss.default:
            self.outputs.append(output)
        return output


@each_host_backend
@each_loss
def test_without_grad_there_is_no_gradient_work(backend, loss):
    case = make_case(loss)
    with OpOutputs() as seen:
        constant = call(case, backend=backend)
        case.hidden.requires_grad_()
        with torch.no_grad():
            no_grad = call(case, backend=backend)
        with torch.inference_mode():
            inference = call(case, backend=backend)
        trained = call(case, backend=backend)
    widths = [dhidden.numel() for _, dhidden in seen.outputs]
    assert widths == [0, 0, 0, case.hidden.numel()]
    assert not constant.requires_grad
    assert not no_grad.requires_grad
    assert trained.requires_grad
    for value in (constant, no_grad, inference):
        assert torch.equal(value, trained)


@each_host_backend
@each_loss
def test_autocast_casts_the_hidden_states(backend, loss):
    own = None if loss == "linear_nll" else 33
    case = make_case(loss, dtype=torch.bfloat16, bias=True, teacher_width=own)
    expected, expected_gradient = run(case, backend=backend)
    case.hidden = case.hidden.float()
    if case.teacher is not None:
        case = Case(
            loss=loss,
            hidden=case.hidden,
            tensors=(*case.tensors[:-1], case.teacher.float()),
            options=case.options,
            upstream=case.upstream,
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_, gradient = run(case, backend=backend)
    assert torch.equal(loss_, expected)
    assert gradient.dtype == torch.float32
    assert torch.equal(gradient, expected_gradient.float())


@each_host_backend
@each_loss
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, loss, use_reentrant):
    case = make_case(loss)

    def step(hidden):
        return getattr(spf, loss)(hidden.tanh(), *case.tensors, backend=backend)

    results = []
    for function in (step, lambda hidden: checkpoint(step, hidden, use_reentrant=use_reentrant)):
        hidden = case.hidden.clone().requires_grad_()
        value = function(hidden)
        value.backward()
        results.append((value.detach(), hidden.grad))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_every_loss_is_exported():
    assert set(LOSSES) <= set(spf.__all__)
