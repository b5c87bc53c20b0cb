"""The one custom op: a loss per token and its gradient by the hidden states.

The head is frozen, so the gradient of every token is known in the forward pass and backward only
scales it. That makes reductions, token weights, gradient accumulation and retain_graph plain
PyTorch around the op. It is opaque to the compiler on purpose: a host loop over tiles or over the
vendor's product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.formulas import LogitTransform
from ..backends.problem import Problem
from . import checks, sketch_checks


@torch.library.custom_op("softprompt_fast::token_loss", mutates_args=())
def token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor | None,
    more_targets: Tensor | None,
    masses: Tensor | None,
    moment: Tensor | None,
    constant: Tensor | None,
    keep: Tensor | None,
    label_smoothing: float,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    beta: float,
    alpha: float,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    with_grad: bool,
    backend: str,
    workspace_mib: float,
) -> tuple[Tensor, Tensor]:
    """loss [T], dhidden [T, D] (empty without gradient); both fp32, 0 where ``keep`` [T] is False.

    dhidden is rounded to the inputs' dtype once, in backward: fp16 would lose small gradients
    before a loss scale can lift them, and bf16 would round them twice.
    targets and keep: T entries in any shape. A target outside the vocabulary is an IndexError;
    the kernels of a GPU cannot raise, and make its row NaN. ``backend`` is a resolved name, never
    "auto". moment [T, D] fp32 and constant [T] fp64 belong to the masses: logit_scale / temperature
    (hidden . moment) is the tail's share of the logits; alpha times it and the constant are taken
    off the loss. For the rest see ``Problem``.
    """
    keep = None if keep is None else keep.flatten()
    if targets is not None and (backend == "torch" or targets.is_cpu):
        ignored = None if keep is None else ~keep.view_as(targets)
        if more_targets is None or masses is None:
            checks.labels_in_range(targets, ignored, weight.shape[0])
        else:
            sketch_checks.entries(targets, more_targets, masses, keep, weight.shape[0])
    # a term without weight costs nothing, and may be infinite
    if alpha == 1 and teacher is not None:
        targets = None
    if alpha == 0:
        teacher = teacher_weight = teacher_bias = None
    problem = Problem(
        hidden,
        weight,
        bias,
        None if targets is None else targets.flatten().long(),
        keep,
        label_smoothing,
        teacher,
        teacher_weight,
        teacher_bias,
        beta,
        0.0 if teacher is None else alpha,
        LogitTransform(softcap, logit_scale, temperature),
        with_grad,
        workspace_mib,
        more_targets,
        masses,
    )
    # what the caller wants in a lower precision has been cast already; these products stay fp32
    with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        loss, dhidden = backends.ENGINES[backend](problem)
        if moment is not None and constant is not None:
            _take_tail_off(problem, alpha, moment, constant, loss, dhidden)
        return loss, dhidden


@token_loss.register_fake
def _(hidden, *others):
    *_, with_grad, _backend, _workspace_mib = others
    tokens, width = hidden.shape
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty((tokens if with_grad else 0, width), dtype=torch.float32),
    )


@torch.library.custom_op("softprompt_fast::token_loss_backward", mutates_args=())
def token_loss_backward(grad_loss: Tensor, dhidden: Tensor, hidden: Tensor) -> Tensor:
    """dhidden scaled by the upstream gradient of each token. ``hidden`` only carries the graph."""
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return torch.mul(dhidden, grad_loss.unsqueeze(-1), out=out)


@token_loss_backward.register_fake
def _(grad_loss, dhidden, hidden):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _take_tail_off(
    problem: Problem,
    alpha: float,
    moment: Tensor,
    constant: Tensor,
    loss: Tensor,
    dhidden: Tensor,
) -> None:
    """The tail's logits are linear in hidden: loss -= scale (h . m), dhidden -= scale m.

    The loss may be the small difference of large numbers, which is rounded only once.
    """
    scale = alpha * problem.transform.logit_scale / problem.transform.temperature
    # a part of the workspace: smaller on a CPU, which does not wait for launches
    step_mib = problem.workspace_mib / (64 if moment.is_cpu else 8)
    step = max(1, int(step_mib * 2**20 / (8 * max(1, moment.shape[1]))))
    for start in range(0, len(loss), step):
        rows = slice(start, start + step)
        tail = moment[rows]
        known = scale * problem.hidden[rows].double().mul_(tail).sum(-1)
        known += alpha * constant[rows]
        if problem.keep is not None:
            # what is ignored may hold anything
            known = torch.where(problem.keep[rows], known, 0.0)
            tail = torch.where(problem.keep[rows].unsqueeze(-1), tail, 0.0)
        loss[rows] = (loss[rows] - known).float()
        if problem.with_grad:
            dhidden[rows].sub_(tail, alpha=scale)


def _save_for_backward(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


def _backward(ctx, grad_loss, _grad_dhidden):
    checks.tensor("the upstream gradient", grad_loss)
    dhidden, hidden = ctx.saved_tensors
    return token_loss_backward(grad_loss, dhidden, hidden), *[None] * 20


def _refuse_double_backward(ctx, grad):
    raise RuntimeError(
        "softprompt_fast losses have no second derivative: their gradient is computed in the "
        "forward pass. Use softprompt_fast.reference where a double backward is needed."
    )


token_loss.register_autograd(_backward, setup_context=_save_for_backward)
token_loss_backward.register_autograd(_refuse_double_backward)
