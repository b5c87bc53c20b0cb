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
from . import checks, op, sketch_checks
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
    return _loss(
        hidden, weight, LossOptions(**options), targets=targets, label_smoothing=label_smoothing
    )


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
    return _loss(
        hidden,
        weight,
        LossOptions(**options),
        labels=labels,
        teacher=teacher,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        beta=beta,
        alpha=1.0,
    )


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
    return _loss(
        hidden,
        weight,
        LossOptions(**options),
        targets=targets,
        label_smoothing=label_smoothing,
        teacher=teacher,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        beta=beta,
        alpha=alpha,
    )


def _loss(
    hidden: Tensor,
    weight: Tensor,
    options: LossOptions,
    *,
    targets: Tensor | None = None,
    labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    teacher: Any = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.0,
    alpha: float | None = None,
) -> Tensor:
    """Check, flatten to [T, D], run the op, reduce. ``alpha`` None: there is no teacher."""
    checks.head(hidden, weight, options.bias)
    checks.factors("token_weight", options.token_weight, "token", hidden.shape[:-1], hidden)
    counted = targets if targets is not None else labels
    keep = None if counted is None else counted != options.ignore_index

    more_targets = masses = moment = constant = None
    if isinstance(teacher, TeacherSketch):
        sketch_checks.fits_loss(teacher, hidden, weight, teacher_weight, beta, options)
        if alpha:
            sketch = teacher.map(lambda value: value.reshape(-1, *value.shape[hidden.dim() - 1 :]))
            moment, constant = sketch.moment, sketch.constant
            targets, more_targets, masses, label_smoothing = sparse_target(
                sketch, None if targets is None else targets.flatten(), alpha, label_smoothing
            )
        teacher = None
    elif alpha is not None:
        checks.teacher(hidden, weight, teacher, teacher_weight, teacher_bias)

    token_loss, _ = op.token_loss(
        _rows(hidden).to(weight.dtype),
        weight,
        options.bias,
        targets,
        more_targets,
        masses,
        moment,
        constant,
        keep,
        label_smoothing,
        None if teacher is None else _rows(teacher).to(weight.dtype),
        teacher_weight,
        teacher_bias,
        beta,
        0.0 if alpha is None else alpha,
        options.softcap,
        options.logit_scale,
        options.temperature,
        torch.is_grad_enabled() and hidden.requires_grad,
        backends.resolve(options.backend, hidden.device),
        options.workspace_mib,
    )
    return reduce_tokens(
        token_loss.view(hidden.shape[:-1]), keep, options.token_weight, options.reduction
    )


def _rows(hidden: Tensor) -> Tensor:
    """[..., D] -> [T, D], also for a single [D] and for no tokens at all."""
    return hidden.unsqueeze(0) if hidden.dim() == 1 else hidden.flatten(0, -2)
