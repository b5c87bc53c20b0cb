"""The numerics contract of the row kernels, a row at a time; random rows, and their oracle.

The oracle is float64 on the same fp32 logits; the bounds are those of ``contract.py``. Every output
starts as NaN, and so does what lies between the rows.

Legend: C rows, V vocabulary, K more targets, q student, p teacher.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from contract import FP16_STEP, U32, U_DTYPE
from torch import Tensor

from softprompt_fast.backends import cuda_rows
from softprompt_fast.backends.formulas import LogitTransform
from softprompt_fast.backends.problem import SparseTarget

BETAS = (0.0, 0.3, 1.0)


@dataclass(kw_only=True)
class Rows:
    """One call. Without beta it is ``sparse_target_rows_``."""

    logits: Tensor
    teacher: Tensor | None = None
    targets: Tensor | None = None
    dtype: torch.dtype = torch.float32
    """of the head: bias and dz"""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> SparseTarget:
        get = self.options.get
        smoothing = get("label_smoothing", 0.0) or None
        return SparseTarget(self.targets, get("more_targets"), get("masses"), smoothing)

    @property
    def transform(self) -> LogitTransform:
        names = [name for name in LogitTransform._fields if name in self.options]
        return LogitTransform(**{name: self.options[name] for name in names})

    def take(self, rows: Any) -> Rows:
        """The same problem over some of its rows."""
        per_row = ("keep", "more_targets", "masses")
        taken = {name: v[rows] for name, v in self.options.items() if name in per_row}
        return replace(
            self,
            logits=self.logits[rows],
            teacher=None if self.teacher is None else self.teacher[rows],
            targets=None if self.targets is None else self.targets[rows],
            options=self.options | taken,
        )

    def with_options(self, **options: Any) -> Rows:
        return replace(self, options={**self.options, **options})


def make_rows(
    vocabulary: int,
    beta: float | None = None,
    *,
    count: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 2.0,
    distance: float | None = 0.5,
    bias: bool = False,
    entries: int | None = None,
    **options: Any,
) -> Rows:
    """Random rows. distance: of the teacher's logits in units of ``spread``; None: unrelated.

    entries: K, of which every third has no mass and an id that must not be looked at.

    With ``alpha`` among the options a divergence has targets, too.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random)

    rows = Rows(logits=spread * normal(count, vocabulary), dtype=dtype, options=options)
    if beta is None or "alpha" in options:
        rows.targets = torch.randint(vocabulary, (count,), generator=random)
    if entries is not None:
        order = torch.rand(count, vocabulary, generator=random)
        order = order.scatter(-1, rows.targets.unsqueeze(-1), -1.0)  # the target is none of them
        ids = order.argsort(-1, descending=True)[:, :entries]
        share = torch.rand(count, 2 + entries, generator=random).softmax(-1)
        share *= 1 - options.get("label_smoothing", 0.0)
        share[:, 1::3] = 0.0
        options["more_targets"] = torch.where(share[:, 1:-1] > 0, ids, 2**40)
        options["masses"] = share[:, :-1].contiguous()
    if beta is not None:
        options["beta"] = beta
        other = spread * normal(count, vocabulary)
        rows.teacher = other if distance is None else rows.logits + distance * other
    if bias:
        options["bias"] = normal(vocabulary).to(dtype)
        if beta is not None:
            options["teacher_bias"] = normal(vocabulary).to(dtype)
    return rows


def poisoned(values: Tensor, device: str, stride: int | None = None) -> Tensor:
    """A copy whose rows lie ``stride`` apart; between and after them lies NaN in any dtype."""
    count, vocabulary = values.shape
    stride = stride or -(-vocabulary // 8) * 8
    size = (count + 1, stride * values.itemsize)
    buffer = torch.full(size, 255, dtype=torch.uint8, device=device).view(values.dtype)
    view = buffer[:count, :vocabulary]
    view.copy_(values)
    return view


def run(
    kernels: Any,
    rows: Rows,
    *,
    in_place: bool = True,
    with_grad: bool = True,
    lifted: bool = False,
    dz_stride: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss, dz, unscale; what must not be written has not been.    lifted: fp16 with unscale"""
    device = "cuda" if kernels is cuda_rows else "cpu"
    logits = poisoned(rows.logits, device)
    count, vocabulary = logits.shape

    def beside(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    target = SparseTarget(*map(beside, rows.target))
    names = {"bias", "teacher_bias", "keep", "alpha", "beta"} & rows.options.keys()
    options = {name: beside(rows.options[name]) for name in names}
    options["transform"] = rows.transform
    loss = torch.full((count,), torch.nan, device=device)
    unscale = torch.full_like(loss, torch.nan) if lifted else None
    dz = None
    if with_grad and in_place:
        dz = logits._base.view(rows.dtype)[:count, :vocabulary]
    elif with_grad:
        dz = poisoned(torch.full(logits.shape, torch.nan, dtype=rows.dtype), device, dz_stride)
    if rows.teacher is None:
        kernels.sparse_target_rows_(logits, target, loss, dz, unscale=unscale, **options)
    else:
        teacher = poisoned(rows.teacher, device)
        kernels.divergence_rows_(
            logits, teacher, loss, dz, target=target, unscale=unscale, **options
        )
        assert_same(teacher.cpu(), rows.teacher)
    if not (with_grad and in_place):
        assert_same(logits.cpu(), rows.logits)
    for view in (logits, dz):
        if view is not None:
            assert view._base[count].isnan().all(), "wrote behind the last row"
    between = dz if dz is not None and not in_place else logits
    assert between._base[:count, vocabulary:].isnan().all(), "wrote between the rows"
    return tuple(None if value is None else value.cpu() for value in (loss, dz, unscale))


def assert_same(*values: Tensor | None) -> None:
    """Bitwise, but for the payload of a NaN."""
    for one, other in zip(values[::2], values[1::2], strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def assert_same_results(actual: tuple, expected: tuple) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


def streams(rows: Rows, raw: Tensor) -> list[Tensor]:
    """Finished logits in float64 of the student, whose raw ones these are, and of the teacher."""

    def finish(raw: Tensor, bias: Tensor | None) -> Tensor:
        return rows.transform(raw if bias is None else raw + bias.double())

    finished = [finish(raw, rows.options.get("bias"))]
    if rows.teacher is not None:
        finished.append(finish(rows.teacher.double(), rows.options.get("teacher_bias")))
    return finished


def reference(rows: Rows) -> tuple[Tensor, Tensor]:
    """loss [C], dz [C, V] in float64."""
    raw = rows.logits.double().requires_grad_()
    z, *teacher = streams(rows, raw)
    if not teacher:
        loss, dz = reference_nll(rows, z.detach())
        return loss, dz * rows.transform.slope(z.detach())
    alpha = rows.options.get("alpha", 1.0)
    loss = alpha * reference_divergence(z, teacher[0], rows.options["beta"])
    if rows.targets is not None:
        smoothing = rows.options.get("label_smoothing", 0.0)
        nll = F.cross_entropy(z, rows.targets, reduction="none", label_smoothing=smoothing)
        loss = loss + (1 - alpha) * nll
    (dz,) = torch.autograd.grad(loss.sum(), raw)
    return loss.detach(), dz


def reference_nll(rows: Rows, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a confident row is far below the rounding of autograd's q - 1."""
    smoothing = rows.options.get("label_smoothing", 0.0)
    target = rows.targets.unsqueeze(-1)
    loss = F.cross_entropy(z, rows.targets, reduction="none", label_smoothing=smoothing)
    others = z.scatter(-1, target, -torch.inf).logsumexp(-1, keepdim=True)
    missing = (others - z.gather(-1, target)).sigmoid()
    dz = z.softmax(-1)
    elsewhere = torch.full_like(missing, smoothing)
    if "masses" in rows.options:
        tail, masses = rows.options["masses"].double().tensor_split([1], -1)
        ids = torch.where(masses > 0, rows.options["more_targets"], target)
        terms = masses * (z.gather(-1, ids) - z.gather(-1, target))
        loss = loss + (tail * z.gather(-1, target) - terms.sum(-1, keepdim=True)).squeeze(-1)
        dz = dz.scatter_add(-1, ids, -masses)
        elsewhere = elsewhere + tail + masses.sum(-1, keepdim=True)
    return loss, dz.scatter(-1, target, elsewhere - missing) - smoothing / z.shape[-1]


def reference_divergence(z: Tensor, z_teacher: Tensor, beta: float) -> Tensor:
    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        absent = log_p.exp() == 0
        log_p, log_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    log_q, log_p = z.log_softmax(-1), z_teacher.log_softmax(-1)
    if beta == 0.0:
        return kl(log_p, log_q)
    if beta == 1.0:
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def check(rows: Rows, loss: Tensor, dz: Tensor | None, unscale: Tensor | None = None) -> None:
    """The contract, row by row."""
    expected_loss, expected = reference(rows)
    finished = streams(rows, rows.logits.double())
    scale = 1 + sum(
        max(part.abs().amax() for part in parts)
        for parts in zip(*((z[z.isfinite()], z.logsumexp(-1)) for z in finished), strict=True)
    )
    error = (loss - expected_loss).abs().max()
    assert error <= 16 * U32 * scale, f"loss: error {error:.3g}, bound {16 * U32 * scale:.3g}"
    if dz is None:
        return
    growth, own = 1.0, 0.0
    if rows.teacher is not None:
        # autograd itself rounds to 2^-53: matters where the true gradient is zero
        own = 2.0**-48 * float(scale)
        if rows.targets is None:
            kl = reference_divergence(*finished, 0.0)
            growth = (0.1 / kl.clamp(min=1e-30).sqrt()).clamp(min=1.0)
    step = 1.0 if unscale is None else unscale
    subnormal = FP16_STEP / 2 * math.sqrt(dz.shape[1]) * (dz.dtype == torch.float16)
    relative = U_DTYPE[dz.dtype] + 8 * U32 * scale * growth
    limit = relative * expected.norm(dim=-1) + subnormal * step + own
    dz = dz.double() if unscale is None else dz.double() * unscale.double().unsqueeze(-1)
    distance = (dz - expected).norm(dim=-1)
    assert (distance <= limit).all(), f"dz: L2 error {distance}, bound {limit}"


def check_run(kernels: Any, rows: Rows, **options: Any) -> None:
    check(rows, *run(kernels, rows, **options))


def check_small_divergence(kernels: Any, beta: float) -> None:
    """Logits that are off by e move KL by e sqrt(2 KL) only: the bound shrinks as sqrt(KL)."""
    for distance in (1e-2, 1e-3, 1e-4):
        rows = make_rows(2053, beta, distance=distance)
        loss, _, _ = run(kernels, rows)
        expected, _ = reference(rows)
        assert expected.max() < 1e-3
        assert (loss > 0).all()
        scale = 1 + 3 * rows.logits.abs().max()
        error, bound = (loss - expected).abs(), 16 * U32 * scale * (2 * expected).sqrt()
        assert (error <= bound).all(), f"loss: error {error}, bound {bound}"
