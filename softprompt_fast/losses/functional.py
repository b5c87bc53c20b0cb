"""The public losses: PyTorch's values and gradients without the [T, V] logits.

Legend: T tokens, D hidden width, V vocabulary. Logit z = softcap(logit_scale (W h + b)) /
temperature. Losses are in nats and float32, whatever the dtype of the inputs. The keyword options
that all of them share, with their defaults, are the fields of ``LossOptions``.

All raise ValueError or TypeError for shapes, dtypes, devices or numbers that do not fit and for a
head that requires grad, IndexError for a label outside the vocabulary; the kernels of a GPU cannot
raise without waiting for it, and make the loss of such a token NaN. Under autocast the hidden
states are cast to the head's dtype. There is no second derivative and no forward-mode derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.formulas import LogitTransform
from ..backends.problem import Head, HiddenTeacher, Problem, SparseTarget
from . import checks, sketch_checks
from .op import token_loss
from .options import LossOptions, check_options, reduce_tokens
from .sketch import TeacherSketch, sparse_target


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """Negative log-likelihood: ``F.cross_entropy(hidden @ weight.T, targets)``.

    hidden [..., D]    weight [V, D], frozen    targets [...] int
    options: ``LossOptions``
    """
    check_options(label_smoothing=label_smoothing, **options)
    checks.labels("targets", targets, hidden)
    own = LossOptions(**options)
    problem = _problem(hidden, weight, own, counted=targets)
    problem = problem._replace(target=SparseTarget(targets, smoothing=label_smoothing or None))
    return _solved(problem, hidden, own)


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor | TeacherSketch,
    *,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.0,
    labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Divergence between the next-token distributions of teacher p and student q.

    ``beta`` 0: KL(p || q), as ``F.kl_div(log_q, log_p, log_target=True).sum(-1)``. 1: KL(q || p).
    Between: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, the generalised
    Jensen-Shannon divergence as TRL and Liger define it.

    hidden [..., D]    weight [V, D], frozen    teacher [..., D_t] hidden states, or a
    ``TeacherSketch`` over [...], with which forward KL, still exact, costs what NLL costs
    teacher_weight [V, D_t], teacher_bias [V]: the teacher's own head; without it, the student's
    labels [...], of which only the tokens unequal to ignore_index count
    options: ``LossOptions``
    """
    check_options(beta=beta, **options)
    if labels is not None:
        checks.labels("labels", labels, hidden)
    own = LossOptions(**options)
    problem = _problem(hidden, weight, own, counted=labels)
    head = (teacher_weight, teacher_bias)
    problem = _taught(problem, hidden, own, teacher, head, beta=beta, alpha=1.0)
    return _solved(problem, hidden, own)


def linear_distill(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Tensor | TeacherSketch,
    *,
    alpha: float = 0.5,
    beta: float = 0.0,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """``alpha * linear_kl(..., labels=targets) + (1 - alpha) * linear_nll(...)`` in one sweep.

    Shapes as in ``linear_kl`` and ``linear_nll``; the temperature applies to both terms.
    """
    check_options(alpha=alpha, beta=beta, label_smoothing=label_smoothing, **options)
    checks.labels("targets", targets, hidden)
    own = LossOptions(**options)
    problem = _problem(hidden, weight, own, counted=targets)
    problem = problem._replace(target=SparseTarget(targets, smoothing=label_smoothing or None))
    head = (teacher_weight, teacher_bias)
    problem = _taught(problem, hidden, own, teacher, head, beta=beta, alpha=alpha)
    return _solved(problem, hidden, own)


def _problem(
    hidden: Tensor, weight: Tensor, options: LossOptions, counted: Tensor | None
) -> Problem:
    """Student and head, flattened to [T, D]; ``counted`` holds the labels that say what counts."""
    checks.head(hidden, weight, options.bias)
    checks.factors("token_weight", options.token_weight, "token", hidden.shape[:-1], hidden)
    transform = LogitTransform(options.softcap, options.logit_scale, options.temperature)
    return Problem(
        _rows(hidden).to(weight.dtype),
        Head(weight, options.bias, transform),
        keep=None if counted is None else counted != options.ignore_index,
        with_grad=torch.is_grad_enabled() and hidden.requires_grad,
        workspace_mib=options.workspace_mib,
    )


def _taught(
    problem: Problem,
    hidden: Tensor,
    options: LossOptions,
    teacher: Tensor | TeacherSketch,
    teacher_head: tuple[Tensor | None, Tensor | None],
    *,
    beta: float,
    alpha: float,
) -> Problem:
    """With a teacher beside its target, if it has one: hidden states stay a teacher, a sketch
    becomes a part of the target."""
    weight, bias = teacher_head
    if isinstance(teacher, TeacherSketch):
        sketch_checks.fits_loss(teacher, hidden, problem.head.weight, weight, beta, options)
        if alpha == 0:
            return problem
        sketch = teacher.map(lambda value: value.reshape(-1, *value.shape[hidden.dim() - 1 :]))
        return problem._replace(target=sparse_target(sketch, problem.target, alpha))
    checks.teacher(hidden, problem.head.weight, teacher, weight, bias)
    states = _rows(teacher).to(problem.hidden.dtype)
    head = None if weight is None else Head(weight, bias, problem.head.transform)
    return problem._replace(teacher=HiddenTeacher(states, head, beta), alpha=alpha)


def _solved(problem: Problem, hidden: Tensor, options: LossOptions) -> Tensor:
    """The loss of each token in the shape of ``hidden``, reduced."""
    loss = token_loss(problem, backends.resolve(options.backend, hidden.device))
    loss = loss.view(hidden.shape[:-1])
    return reduce_tokens(loss, problem.keep, options.token_weight, options.reduction)


def _rows(hidden: Tensor) -> Tensor:
    """[..., D] -> [T, D], also for a single [D] and for no tokens at all."""
    return hidden.unsqueeze(0) if hidden.dim() == 1 else hidden.flatten(0, -2)
