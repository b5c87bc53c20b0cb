"""The custom ops keep PyTorch's rules, and a compiled loss is the eager one."""

from __future__ import annotations

import pytest
import torch
from contract import Case, each_cpu_backend, each_loss, make_case, run
from torch.library import opcheck

import softprompt_fast as spf
from softprompt_fast.losses import op

ARGUMENT_SETS = {
    "nll": ("linear_nll", {}),
    "nll, every option": (
        "linear_nll",
        {"bias": True, "ignored": 0.3, "softcap": 5.0, "label_smoothing": 0.1, "temperature": 2.0},
    ),
    "kl": ("linear_kl", {}),
    "kl, own head": ("linear_kl", {"beta": 0.3, "teacher_width": 5, "bias": True, "ignored": 0.3}),
    "distill": ("linear_distill", {"beta": 1.0, "ignored": 0.3}),
    "all ignored": ("linear_nll", {"ignored": 1.1}),
    "no tokens": ("linear_kl", {"shape": (0,)}),
    "bf16": ("linear_distill", {"dtype": torch.bfloat16}),
    "fp16": ("linear_nll", {"dtype": torch.float16}),
}


def op_arguments(case: Case, backend: str, with_grad: bool) -> tuple:
    """The arguments of softprompt_fast::token_loss, as the public loss hands them over."""
    case.hidden = case.hidden.clone().requires_grad_(with_grad)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Handed) as handed:
        patch.setattr(op, "solve", hand_over)
        call(case, case.hidden, backend)
    hidden, *others = handed.value.args
    return hidden.detach(), *others


class Handed(Exception):
    pass


def hand_over(*arguments) -> None:
    raise Handed(*arguments)


@pytest.mark.long_interpreted
@each_cpu_backend
@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("name", ARGUMENT_SETS)
def test_opcheck_token_loss(backend, name, with_grad):
    loss, options = ARGUMENT_SETS[name]
    case = make_case(loss, **options)
    opcheck(torch.ops.softprompt_fast.token_loss.default, op_arguments(case, backend, with_grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_opcheck_token_loss_backward(dtype, tokens):
    hidden = torch.randn(tokens, 4).to(dtype)
    dhidden = hidden.float() if dtype == torch.float16 else hidden
    arguments = (torch.randn(tokens), dhidden, hidden)
    opcheck(torch.ops.softprompt_fast.token_loss_backward.default, arguments)


def test_the_ops_are_opaque_to_the_compiler_and_mutate_nothing():
    for name in ("token_loss", "token_loss_backward"):
        schema = getattr(torch.ops.softprompt_fast, name).default._schema
        assert not schema.is_mutable


def test_the_compiled_op_mutates_only_what_it_says():
    """Its outputs and its workspace are arguments; everything else is read."""
    schema = torch.ops.softprompt_fast_C.token_loss_.default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert set(written) == {"loss", "dhidden", "workspace"}
    assert not schema.returns


@pytest.mark.parametrize("name", ["nll, every option", "kl, own head", "distill"])
def test_opcheck_the_compiled_op(name, monkeypatch):
    """With the very arguments that the engine hands it."""
    loss, options = ARGUMENT_SETS[name]
    case = make_case(loss, **options)
    compiled_op, calls = torch.ops.softprompt_fast_C.token_loss_, []
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.ops.softprompt_fast_C, "token_loss_", lambda *arguments: calls.append(arguments)
        )
        call(case, case.hidden.requires_grad_(), "cpp")
    (arguments,) = calls
    opcheck(compiled_op.default, arguments, test_utils="test_schema")


def call(case: Case, hidden: torch.Tensor, backend: str) -> torch.Tensor:
    return getattr(spf, case.loss)(hidden, *case.tensors, **case.options, backend=backend)


def compiled(case: Case, backend: str, compiler: str):
    """(loss, gradient by hidden) through torch.compile."""
    torch._dynamo.reset()
    function = torch.compile(call, fullgraph=True, backend=compiler)
    hidden = case.hidden.clone().requires_grad_()
    loss = function(case, hidden, backend)
    (gradient,) = torch.autograd.grad(loss, hidden, case.upstream.expand_as(loss))
    return loss.detach(), gradient


def assert_equal(actual, expected):
    """The op is the same; the reduction around it may be compiled to another summation order."""
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.long_interpreted
@each_cpu_backend
@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_equals_eager(backend, loss, reduction):
    case = make_case(loss, bias=True, weighted=True, ignored=0.3, softcap=5.0, reduction=reduction)
    assert_equal(compiled(case, backend, "aot_eager"), run(case, backend=backend))


@pytest.mark.slow
@each_cpu_backend
def test_inductor_equals_eager(backend):
    case = make_case("linear_distill", shape=(2, 7), ignored=0.3, beta=0.3)
    assert_equal(compiled(case, backend, "inductor"), run(case, backend=backend))


@pytest.mark.long_interpreted
@each_cpu_backend
@each_loss
def test_one_graph_for_every_number_of_tokens(backend, loss):
    torch._dynamo.reset()
    function = torch.compile(getattr(spf, loss), fullgraph=True, backend="aot_eager")
    for tokens in (9, 17, 5, 64):
        case = make_case(loss, shape=(tokens,), ignored=0.3)
        hidden = case.hidden.clone().requires_grad_()
        for value in (hidden, *case.tensors[1:], *case.options.values()):
            if isinstance(value, torch.Tensor):
                torch._dynamo.mark_dynamic(value, 0)
        with torch._dynamo.config.patch(error_on_recompile=tokens != 9):
            value = function(hidden, *case.tensors, **case.options, backend=backend)
        (gradient,) = torch.autograd.grad(value, hidden, case.upstream)
        assert_equal((value.detach(), gradient), run(case, backend=backend))


@pytest.mark.long_interpreted
@each_cpu_backend
def test_numbers_may_change_between_calls_of_a_compiled_loss(backend):
    """A schedule of the temperature; the compiler turns a number that changes into a symbol."""
    torch._dynamo.reset()
    function = torch.compile(spf.linear_distill, fullgraph=True, backend="aot_eager")
    for number in (0.5, 0.6, 0.7):
        options = dict.fromkeys(["alpha", "beta", "logit_scale", "label_smoothing"], number)
        case = make_case("linear_distill", temperature=2 * number, softcap=9 * number, **options)
        hidden = case.hidden.clone().requires_grad_()
        value = function(hidden, *case.tensors, **case.options, backend=backend)
        (gradient,) = torch.autograd.grad(value, hidden, case.upstream)
        assert_equal((value.detach(), gradient), run(case, backend=backend))


def test_compiled_code_still_refuses_a_label_outside_the_vocabulary():
    case = make_case("linear_nll")
    case.targets[3] = 131
    with pytest.raises(IndexError, match=r"target at \[3\] is 131"):
        compiled(case, "torch", "aot_eager")
