"""The one custom op: a loss per token and its gradient by the hidden states.

The head is frozen, so the gradient of every token is known in the forward pass and backward only
scales it. That makes reductions, token weights, gradient accumulation and retain_graph plain
PyTorch around the op. It is opaque to the compiler on purpose: a host loop over tiles or over the
vendor's product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.problem import Problem, Tail, flatten, schema, unflatten
from . import checks, sketch_checks


def token_loss(problem: Problem, backend: str) -> Tensor:
    """loss [T] in fp32, differentiable by ``problem.hidden``; 0 where ``problem.keep`` is False.

    ``backend`` is a resolved name, never "auto". The target's ids and ``keep`` may have T entries
    in any shape, and the ids be int32. An id outside the vocabulary is an IndexError; the kernels
    of a GPU cannot raise, and make its row NaN.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _TokenLoss.apply
    return apply(problem.hidden, problem, backend)[0]


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(hidden: Tensor, problem: Problem, backend: str) -> tuple[Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor] = solve(*flatten(problem._replace(hidden=hidden)), backend)
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _loss, dhidden = output
        ctx.mark_non_differentiable(dhidden)
        ctx.save_for_backward(dhidden, inputs[0])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_dhidden: Tensor) -> tuple[Tensor, None, None]:
        checks.no_tangent("the upstream gradient", grad_loss)
        apply: Callable[..., Tensor] = _Scaled.apply
        return apply(grad_loss, *ctx.saved_tensors), None, None


class _Scaled(torch.autograd.Function):
    """dhidden [T, D] times the upstream gradient [T] of its token, rounded to hidden's dtype once.

    fp16 would lose small gradients before a loss scale can lift them, and bf16 would round twice.
    """

    @staticmethod
    def forward(grad_loss: Tensor, dhidden: Tensor, hidden: Tensor) -> Tensor:
        scaled: Tensor = scale(grad_loss, dhidden, hidden)
        return scaled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        raise RuntimeError(
            "softprompt_fast losses have no second derivative: their gradient is computed in the "
            "forward pass. Use softprompt_fast.reference where a double backward is needed."
        )


@torch.library.custom_op(
    "softprompt_fast::token_loss",
    mutates_args=(),
    schema=f"({', '.join(schema())}, str backend) -> (Tensor, Tensor)",
)
def solve(*arguments: Any) -> tuple[Tensor, Tensor]:
    """From a flattened problem and a backend to loss [T] and dhidden [T, D] (empty without
    gradient), both in fp32."""
    *leaves, backend = arguments
    problem = _checked(unflatten(leaves), backend)
    tail, engine = None, backends.ENGINES[backend]
    if problem.target is not None:
        tail = problem.target.tail
        problem = problem._replace(target=problem.target._replace(tail=None))
    # what the caller wants in a lower precision has been cast already; these products stay fp32
    with (
        torch.autocast(problem.hidden.device.type, enabled=False),
        torch.cuda.device_of(problem.hidden),
    ):
        loss, dhidden = engine(problem)
        if tail is not None:
            _take_off(tail, problem, loss, dhidden)
        return loss, dhidden


@solve.register_fake
def _(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    problem = unflatten((hidden, *others))
    tokens, width = hidden.shape
    return (
        hidden.new_empty(tokens, dtype=torch.float32),
        hidden.new_empty((tokens if problem.with_grad else 0, width), dtype=torch.float32),
    )


@torch.library.custom_op("softprompt_fast::token_loss_backward", mutates_args=())
def scale(grad_loss: Tensor, dhidden: Tensor, hidden: Tensor) -> Tensor:
    """dhidden scaled by the upstream gradient of each token, in hidden's dtype."""
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    return torch.mul(dhidden, grad_loss.unsqueeze(-1), out=out)


@scale.register_fake
def _(grad_loss: Tensor, dhidden: Tensor, hidden: Tensor) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _checked(problem: Problem, backend: str) -> Problem:
    """With its ids in range, as far as the host can see them, and no term that has no weight."""
    keep, target = problem.keep, problem.target
    problem = problem._replace(keep=None if keep is None else keep.flatten())
    if target is not None:
        if backend == "torch" or target.ids.is_cpu:
            vocabulary = len(problem.head.weight)
            if target.more is None:
                ignored = None if keep is None else ~keep.view_as(target.ids)
                checks.labels_in_range(target.ids, ignored, vocabulary)
            else:
                sketch_checks.entries(target, problem.keep, vocabulary)
        problem = problem._replace(target=target._replace(ids=target.ids.flatten().long()))
    # a term without weight costs nothing, and may be infinite
    if problem.alpha == 0:
        problem = problem._replace(teacher=None)
    elif problem.alpha == 1:
        problem = problem._replace(target=None)
    return problem


def _take_off(tail: Tail, problem: Problem, loss: Tensor, dhidden: Tensor) -> None:
    """The tail's logits are linear in hidden: loss -= factor (h . m), dhidden -= factor m.

    The loss may be the small difference of large numbers, which is rounded only once.
    """
    transform = problem.head.transform
    factor = tail.weight * transform.logit_scale / transform.temperature
    # a part of the workspace: smaller on a CPU, which does not wait for launches
    step_mib = problem.workspace_mib / (64 if tail.moment.is_cpu else 8)
    step = max(1, int(step_mib * 2**20 / (8 * max(1, tail.moment.shape[1]))))
    for start in range(0, len(loss), step):
        rows = slice(start, start + step)
        moment = tail.moment[rows]
        known = factor * problem.hidden[rows].double().mul_(moment).sum(-1)
        known += tail.weight * tail.constant[rows]
        if problem.keep is not None:
            # what is ignored may hold anything
            known = torch.where(problem.keep[rows], known, 0.0)
            moment = torch.where(problem.keep[rows].unsqueeze(-1), moment, 0.0)
        loss[rows] = (loss[rows] - known).float()
        if problem.with_grad:
            dhidden[rows].sub_(moment, alpha=factor)
