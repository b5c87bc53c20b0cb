"""The numerics contract of every loss and backend: its bounds, its oracle, and random problems.

The oracle is ``softprompt_fast.reference`` in float64 on the same rounded inputs. With
S = 1 + max|lse| + max|z| over student and teacher, and u32 = 2^-24:

    loss of a token         |error| <= 16 u32 S, whatever the dtype of the inputs
    gradient by hidden      relative L2 error <= u_dtype + 8 u32 S growth

u_dtype is what writing the gradient in the inputs' dtype costs anyway. growth is 1, and
0.1 / sqrt(KL) for a divergence below 1e-2 nats: the gradient shrinks as sqrt(KL), the rounding of
the logits does not.

Legend: T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.backends import registry

# Interpreted, the GPU's backends take tensors on the CPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("torch", "cpp", "triton", "streaming")
INTERPRETED = ("triton", "streaming") if spf.backends.interpreted() else ()
if DEVICE.type == "cuda":
    BACKENDS += ("cuda",)
# Those that take tensors on the CPU, here.
CPU_BACKENDS = BACKENDS if DEVICE.type == "cpu" else ("torch", "cpp")
LOSSES = ("linear_nll", "linear_kl", "linear_distill")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100

U32 = 2.0**-24
U_DTYPE = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FP16_STEP = 2.0**-24  # between neighbouring numbers near zero

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_cpu_backend = pytest.mark.parametrize("backend", CPU_BACKENDS)
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """Interpreted kernels do without fp16, which goes their bf16's way: the interpreter is slow."""
    return DTYPES[:2] if backend in INTERPRETED else DTYPES


def backends_and_dtypes(backends: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("dtype", "backend"),
        [
            pytest.param(dtype, backend, id=f"{str(dtype)[6:]}-{backend}")
            for backend in backends
            for dtype in dtypes_of(backend)
        ],
    )


each_backend_and_dtype = backends_and_dtypes(BACKENDS)


@dataclass(kw_only=True)
class Case:
    """One call, ``loss(hidden, *tensors, **options)``, and the gradient that reaches it."""

    loss: str
    hidden: Tensor
    tensors: tuple[Tensor, ...]
    """the arguments after hidden: weight, then targets, teacher or both"""
    options: dict[str, Any]
    upstream: Tensor | None = None
    """gradient by the loss; None: ones"""

    @property
    def weight(self) -> Tensor:
        return self.tensors[0]

    @property
    def targets(self) -> Tensor | None:
        return self.options.get("labels") if self.loss == "linear_kl" else self.tensors[1]

    @property
    def teacher(self) -> Tensor | None:
        return None if self.loss == "linear_nll" else self.tensors[-1]

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    def change(self, function: Callable[[Tensor], Tensor]) -> Case:
        """The same case with ``function`` applied to its tensors, but for the upstream gradient."""

        def changed(value: Any) -> Any:
            if isinstance(value, spf.TeacherSketch):
                return value.map(function)
            return function(value) if isinstance(value, Tensor) else value

        return replace(
            self,
            hidden=changed(self.hidden),
            tensors=tuple(map(changed, self.tensors)),
            options={name: changed(value) for name, value in self.options.items()},
        )

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in a wider dtype."""
        return self.change(lambda value: value.to(dtype) if value.is_floating_point() else value)

    def on(self, device: torch.device) -> Case:
        return self.change(lambda value: value.to(device))

    def double(self) -> Case:
        return self.to(torch.float64)

    def rows(self, index: Any) -> Case:
        """The same problem over some of its tokens; hidden is [T, D]."""
        per_token = {"labels", "token_weight"}
        return replace(
            self,
            hidden=self.hidden[index],
            tensors=(self.weight, *(value[index] for value in self.tensors[1:])),
            options={
                name: value[index] if name in per_token and value is not None else value
                for name, value in self.options.items()
            },
            upstream=None if self.upstream is None else self.upstream[index],
        )


def make_case(
    loss: str,
    *,
    shape: tuple[int, ...] = (9,),
    width: int = 24,
    vocabulary: int = 131,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 2.0,
    distance: float = 0.5,
    bias: bool = False,
    weighted: bool = False,
    ignored: float = 0.0,
    teacher_width: int | None = None,
    **options: Any,
) -> Case:
    """A random problem. Its raw logits have standard deviation ``spread``.

    distance: of the teacher's hidden states from the student's, in standard deviations of either
    ignored: share of the tokens that count nothing    weighted: with token_weight
    teacher_width: the teacher has a head of its own, this wide
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random)

    def head(width: int) -> Tensor:
        return (normal(vocabulary, width) * spread / math.sqrt(width)).to(dtype)

    hidden, weight = normal(*shape, width), head(width)
    targets = torch.randint(vocabulary, shape, generator=random)
    targets[torch.rand(shape, generator=random) < ignored] = IGNORED
    if bias:
        options["bias"] = normal(vocabulary).to(dtype)
    if weighted:
        options["token_weight"] = torch.rand(shape, generator=random)
    tensors = [weight]
    if loss != "linear_kl":
        tensors.append(targets)
    elif ignored:
        options["labels"] = targets
    if loss != "linear_nll":
        if teacher_width is None:
            tensors.append((hidden + distance * normal(*shape, width)).to(dtype))
        else:
            options["teacher_weight"] = head(teacher_width)
            if bias:
                options["teacher_bias"] = normal(vocabulary).to(dtype)
            tensors.append(normal(*shape, teacher_width).to(dtype))
    upstream = normal(*shape) if options.get("reduction") == "none" else normal()
    return Case(
        loss=loss,
        hidden=hidden.to(dtype),
        tensors=tuple(tensors),
        options=options,
        upstream=upstream,
    )


def sketch_of(case: Case, top_k: int | None = None) -> spf.TeacherSketch:
    shared = ("bias", "logit_scale", "temperature")
    options = {name: case.options[name] for name in shared if name in case.options}
    return spf.sketch_teacher(case.teacher, case.weight, top_k=top_k, **options)


def sketched(case: Case, top_k: int | None = None) -> Case:
    """The same problem with a sketch in the place of the teacher's hidden states."""
    return replace(case, tensors=(*case.tensors[:-1], sketch_of(case, top_k)))


def moved_to(case: Case, kl: float) -> Case:
    """The student on the straight line to its teacher, where KL(p || q) is about ``kl``."""
    step = distance_at(kl, *reversed(_streams(case)))
    hidden = case.teacher + step * (case.hidden - case.teacher)
    return replace(case, hidden=hidden.to(case.hidden.dtype))


def distance_at(kl: float, z_teacher: Tensor, z_start: Tensor) -> float:
    """Where on the line from the teacher's logits (0) to these (1) KL is ``kl``, or 1."""
    log_p = z_teacher.log_softmax(-1)
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        log_q = (z_teacher + middle * (z_start - z_teacher)).log_softmax(-1)
        value = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        low, high = (low, middle) if value > kl else (middle, high)
    return high


@st.composite
def cases(draw: st.DrawFn, loss: str, **fixed: Any) -> Case:
    """Any problem that ``loss`` takes; ``fixed`` options of ``make_case`` are not drawn."""

    def pick(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    options = {
        "shape": pick((), (1,), (2,), (7,), (8,), (19,), (33,), (2, 5), (3, 1, 4)),
        "width": pick(1, 3, 8, 17, 64, 101),
        "vocabulary": pick(1, 2, 3, 16, 64, 131, 259, 1000),
        "dtype": pick(*DTYPES),
        "seed": draw(st.integers(0, 2**32 - 1)),
        "spread": pick(0.1, 1.0, 4.0),
        "bias": pick(False, True),
        "weighted": pick(False, True),
        "ignored": pick(0.0, 0.0, 0.3, 1.0),
        "softcap": pick(None, None, 5.0, 30.0),
        "logit_scale": pick(1.0, 1.0, 0.0625, 1.7),
        "temperature": pick(1.0, 1.0, 0.5, 3.0),
        "reduction": pick("mean", "sum", "none"),
    }
    if loss != "linear_kl":
        options["label_smoothing"] = pick(0.0, 0.0, 0.1, 0.3)
    if loss != "linear_nll":
        options["distance"] = pick(1.0, 0.1, 0.01)
        options["teacher_width"] = pick(None, None, 5, 48)
        options["beta"] = draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)))
    if loss == "linear_distill":
        options["alpha"] = pick(0.0, 0.3, 0.5, 1.0)
    return make_case(loss, **{**options, **fixed})


def effort(backend: str, count: int) -> int:
    """How many of ``count`` problems to solve: Triton's interpreter needs 0.1 s for a small one."""
    return max(1, count // 8) if backend in INTERPRETED else count


def hold(
    backend: str,
    problems: st.SearchStrategy[Case],
    change: Callable[[Case], Case] = lambda case: case,
) -> None:
    """Random problems hold the contract; the same ones in every run, as long as ``law`` reads so.

    change: made to a problem before it is solved, and not for the oracle
    """

    @settings(max_examples=effort(backend, 40), deadline=None, derandomize=True, database=None)
    @given(case=problems)
    def law(case: Case) -> None:
        check(case, *run(change(case), backend=backend))

    law()


def run(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient by hidden) of the library.    options: backend and others for this call"""
    backend = options.get("backend")
    device = torch.device("cpu") if backend == "cpp" else DEVICE
    kernels_write = backend == "cpp" or registry.DEVICES.get(str(backend)) == "cuda"
    with fresh_memory_is_nan() if kernels_write else contextlib.nullcontext():
        results = _loss_and_gradient(spf, case.with_options(**options).on(device))
    return tuple(value.cpu() for value in results)


@contextlib.contextmanager
def fresh_memory_is_nan() -> Iterator[None]:
    """What nobody wrote cannot look right: ``torch.empty`` is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def oracle(case: Case) -> tuple[Tensor, Tensor]:
    """(loss, gradient by hidden) in float64."""
    return _loss_and_gradient(spf.reference, case.double())


def _loss_and_gradient(module: Any, case: Case) -> tuple[Tensor, Tensor]:
    hidden = case.hidden.detach().requires_grad_()
    loss = getattr(module, case.loss)(hidden, *case.tensors, **case.options)
    upstream = torch.ones(()) if case.upstream is None else case.upstream
    (gradient,) = torch.autograd.grad(loss, hidden, upstream.to(loss).expand_as(loss))
    return loss.detach(), gradient


def check(case: Case, loss: Tensor, gradient: Tensor) -> None:
    """Loss and gradient hold the contract."""
    expected_loss, expected_gradient = oracle(case)
    assert loss.dtype == torch.float32
    assert loss.shape == expected_loss.shape
    assert gradient.dtype == case.hidden.dtype
    assert gradient.shape == case.hidden.shape
    error = (loss - expected_loss).abs()
    bound = loss_bound(case)
    assert (error <= bound).all(), f"loss: error {error.max():.3g}, bound {bound.max():.3g}"
    distance = (gradient - expected_gradient).norm()
    limit = gradient_bound(case, expected_gradient)
    assert distance <= limit, f"gradient: L2 error {distance:.3g}, bound {limit:.3g}"


def loss_bound(case: Case) -> Tensor:
    """What the returned loss may be off by: [...] for reduction "none", else one number."""
    error = 16 * U32 * _scale(case) * token_factors(case).abs()
    return error if case.options.get("reduction") == "none" else error.sum()


def gradient_bound(case: Case, expected: Tensor) -> float:
    """What the gradient may be off by, in L2 norm.    expected: the oracle's gradient"""
    scale, dtype = _scale(case), case.hidden.dtype
    relative = U_DTYPE[dtype] + 8 * U32 * scale * _growth(case)
    subnormal = FP16_STEP / 2 * math.sqrt(expected.numel()) if dtype == torch.float16 else 0.0
    # the oracle itself rounds to 2^-53: matters where the true gradient is zero
    upstream = token_factors(case) * (1.0 if case.upstream is None else case.upstream)
    own = 2.0**-48 * scale * float(upstream.norm() * case.weight.double().norm())
    return relative * float(expected.norm()) + subnormal + own


def token_factors(case: Case) -> Tensor:
    """How often each token's own loss goes into what is returned.    [...] float64"""
    factors = torch.ones(case.hidden.shape[:-1], dtype=torch.float64)
    if case.options.get("token_weight") is not None:
        factors = factors * case.options["token_weight"]
    if case.targets is not None:
        factors = factors * (case.targets != case.options.get("ignore_index", IGNORED))
    if case.options.get("reduction", "mean") == "mean" and factors.sum() != 0:
        factors = factors / factors.sum()
    return factors


def _scale(case: Case) -> float:
    """S over both streams of logits; entries at -inf do not round."""
    largest_z = largest_lse = 0.0
    for z in _streams(case):
        lse = z.logsumexp(-1)
        if z.isfinite().any():
            largest_z = max(largest_z, float(z[z.isfinite()].abs().max()))
            largest_lse = max(largest_lse, float(lse[lse.isfinite()].abs().max()))
    return 1 + largest_lse + largest_z


def _growth(case: Case) -> float:
    """0.1 / sqrt(KL) where the loss is a divergence below 1e-2 nats, else 1.

    A batch has the mean KL of its tokens, each weighted by the square of its upstream gradient, as
    its error is in the L2 norm.
    """
    weight = {"linear_nll": 0.0, "linear_kl": 1.0, "linear_distill": 0.5}[case.loss]
    if case.options.get("alpha", weight) < 1:
        return 1.0
    log_q, log_p = (z.log_softmax(-1) for z in _streams(case))
    kl = (log_p.exp() * (log_p - log_q)).nan_to_num(0.0).sum(-1)
    square = (token_factors(case) * (1.0 if case.upstream is None else case.upstream)) ** 2
    if square.sum() == 0:
        return 1.0
    mean = float((square * kl).sum() / square.sum())
    return max(1.0, 0.1 / math.sqrt(max(mean, 1e-30)))


def _streams(case: Case) -> list[Tensor]:
    """The float64 logits of the student and, where there is one, of the teacher."""
    case = case.double()
    options = case.options
    head = {
        name: options[name] for name in ("softcap", "logit_scale", "temperature") if name in options
    }
    streams = [spf.reference.logits(case.hidden, case.weight, bias=options.get("bias"), **head)]
    if case.teacher is not None:
        own = options.get("teacher_weight")
        weight = case.weight if own is None else own
        bias = options.get("bias") if own is None else options.get("teacher_bias")
        streams.append(spf.reference.logits(case.teacher, weight, bias=bias, **head))
    return streams
