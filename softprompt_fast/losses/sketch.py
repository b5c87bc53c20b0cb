"""The teacher sketch: what an exact KL(p || q) needs to know of the teacher, in O(k + D) numbers.

With a linear head, z = logit_scale (W h + b) / temperature, a sum over the vocabulary splits into
the k largest entries of p and a tail that is linear in the student's hidden state h:

    sum_v p_v z_v = sum_{v in top k} p_v z_v + logit_scale / temperature (h . m + c)
    m = sum_{v in tail} p_v W_v            c = sum_{v in tail} p_v b_v

so KL(p || q) = lse(z) - sum_v p_v z_v - H(p), and its gradient by h, cost what NLL costs. That the
expectation alone is enough was published as the "KL cache trick" (jonathanc.net, 2026-05-12). The k
entries are kept apart because q - p is rounded where 16-bit numbers are multiplied: without them
the error grows as q comes close to p.

Legend: T tokens, C of them at a time, D hidden width, V vocabulary, k entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..backends.formulas import LogitTransform
from ..backends.matmul import project, project_back
from ..backends.problem import SparseTarget, Tail, check_workspace
from . import checks, sketch_checks
from .options import check_options

# Entries kept apart, over a head in fp32 or in 16 bits: there, what is left in the tail is rounded.
TOP_K, TOP_K_16_BIT = 32, 128
# [C, V] fp32 buffers alive at once: raw and finished logits, and two or three in double.
BUFFERS = 11


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherSketch:
    """The teacher's next-token distributions p, for exact forward KL. Made by ``sketch_teacher``.

    Indexing, slicing and masks take tokens: ``sketch[3:7]``, ``sketch[keep]``.
    """

    ids: Tensor
    """[..., k] int32, the most probable entries, the largest first"""
    probs: Tensor
    """[..., k] fp32, their probabilities"""
    tail: Tensor
    """[...] fp32, the probability of all others"""
    moment: Tensor
    """[..., D] fp32, the sum of p_v W_v over the others"""
    tail_bias: Tensor
    """[...] fp32, the sum of p_v b_v over the others"""
    entropy: Tensor
    """[...] fp64, of the whole distribution, in nats: the loss is what lies beyond it"""
    logit_scale: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        sketch_checks.fields(self)

    @property
    def constant(self) -> Tensor:
        """[...] fp64, what the loss has that no hidden state of the student changes."""
        return self.entropy + self.logit_scale / self.temperature * self.tail_bias

    def map(self, change: Callable[[Tensor], Tensor]) -> TeacherSketch:
        """With ``change`` applied to every tensor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        changed: Any = {n: change(v) if isinstance(v, Tensor) else v for n, v in values.items()}
        return TeacherSketch(**changed)

    def __getitem__(self, index: Any) -> TeacherSketch:
        return self.map(lambda value: value[index])

    def to(self, device: torch.device | str) -> TeacherSketch:
        return self.map(lambda value: value.to(device))

    @staticmethod
    def cat(sketches: Sequence[TeacherSketch]) -> TeacherSketch:
        """One after another. Raises ValueError where they were not made with the same options."""
        first = sketches[0]
        for other in sketches[1:]:
            sketch_checks.same_options(first, other)
        values = {field.name: getattr(first, field.name) for field in fields(first)}
        joined: Any = {
            name: torch.cat([getattr(sketch, name) for sketch in sketches])
            if isinstance(value, Tensor)
            else value
            for name, value in values.items()
        }
        return TeacherSketch(**joined)


def entries_kept(top_k: int | None, dtype: torch.dtype) -> int:
    """top_k, or what it is by default over a head in ``dtype``.

    So many that rounding the tail adds little to what rounding the gradient costs, over text that
    a model finds hard, with a student 1e-4 nats from its teacher.
    """
    if top_k is not None:
        return top_k
    return TOP_K_16_BIT if dtype.itemsize == 2 else TOP_K


@torch.no_grad()
def sketch_teacher(
    hidden: Tensor,
    weight: Tensor,
    *,
    top_k: int | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    workspace_mib: float = 256,
) -> TeacherSketch:
    """Sketch softmax(logit_scale (W h + b) / temperature) for every hidden state of the teacher.

    hidden [..., D]    weight [V, D] and bias [V], the head that the student shares
    top_k: entries that are kept apart, at most V; None: ``entries_kept``. More of them cost 8
    bytes each; where probabilities are flat and the head is in 16 bits they buy precision.
    Raises ValueError or TypeError as the losses do.
    """
    top_k = entries_kept(top_k, weight.dtype)
    check_options(
        top_k=top_k,
        logit_scale=logit_scale,
        temperature=temperature,
        workspace_mib=workspace_mib,
    )
    checks.head(hidden, weight, bias)
    rows = (hidden.unsqueeze(0) if hidden.dim() == 1 else hidden.flatten(0, -2)).to(weight.dtype)
    V, D = weight.shape
    row_bytes = 4 * (BUFFERS * V + (3 * min(top_k, V) + 4) * D)
    check_workspace(row_bytes, workspace_mib, "the logits of one token")
    transform = LogitTransform(None, logit_scale, temperature)
    chunk = max(1, int(workspace_mib * 2**20 / row_bytes))
    parts = [_sketch(part, weight, bias, min(top_k, V), transform) for part in rows.split(chunk)]
    return TeacherSketch.cat(parts).map(
        lambda value: value.view((*hidden.shape[:-1], *value.shape[1:]))
    )


def _sketch(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int, transform: LogitTransform
) -> TeacherSketch:
    """Of one chunk of rows. All that is summed is in double, and so are the largest logits, whose
    rounding is most of what a gradient would see: this is done only once."""
    raw = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
    project(hidden, weight, raw)
    z = transform(raw if bias is None else raw + bias).double()
    ids = z.topk(k).indices
    top_raw = torch.einsum("cd,ckd->ck", hidden.double(), weight[ids].double())
    top_z = transform(top_raw if bias is None else top_raw + bias[ids])
    top_z, order = top_z.sort(-1, descending=True)
    ids = ids.gather(-1, order)
    z.scatter_(-1, ids, top_z)
    lse = z.logsumexp(-1, keepdim=True)
    p = (z - lse).exp_()
    probs = p.gather(-1, ids)
    p.scatter_(-1, ids, 0.0)
    tail = p.sum(-1)
    tail_bias = torch.zeros_like(tail)
    if bias is not None:
        # an entry that is impossible has the bias -inf
        tail_bias = torch.where(p > 0, p * bias, 0.0).sum(-1)
    moment = hidden.new_empty(hidden.shape, dtype=torch.float32)
    project_back(p.float(), weight, moment)
    # As the loss will see it, the moment's rounding included: so KL(p || p) comes out as 0.
    tail_z = transform.slope(z) * ((hidden.double() * moment).sum(-1) + tail_bias.float())
    first = top_z[:, 0]
    more = torch.where(probs > 0, probs.float() * (top_z - top_z[:, :1]), 0.0).sum(-1)
    entropy = lse.squeeze(-1) - first - more + tail.float() * first - tail_z
    return TeacherSketch(
        ids=ids.int(),
        probs=probs.float(),
        tail=tail.float(),
        moment=moment,
        tail_bias=tail_bias.float(),
        entropy=entropy,
        logit_scale=transform.logit_scale,
        temperature=transform.temperature,
    )


def sparse_target(sketch: TeacherSketch, label: SparseTarget | None, alpha: float) -> SparseTarget:
    """alpha p + (1 - alpha) ((1 - smoothing) onehot(ids) + smoothing / V).

    sketch over [T], p its distribution. label: ids [...] of T labels, and smoothing; without it
    alpha is 1.
    """
    first, more = sketch.ids[:, :1].long(), sketch.ids[:, 1:].long()
    masses = alpha * torch.cat([sketch.tail.unsqueeze(-1), sketch.probs[:, 1:]], -1)
    tail = Tail(sketch.moment, sketch.constant, alpha)
    if label is None or alpha == 1:
        return SparseTarget(first.squeeze(-1), more.contiguous(), masses, tail=tail)
    ids = label.ids.flatten().long().unsqueeze(-1)
    smoothing = label.smoothing or 0.0
    mass = (1 - alpha) * (1 - smoothing)
    is_more = more == ids
    listed = is_more.any(-1, keepdim=True) | (first == ids)
    own = torch.where(listed, 0.0, mass).to(masses)
    return SparseTarget(
        first.squeeze(-1),
        torch.cat([more, ids], -1),
        torch.cat([masses[:, :1], masses[:, 1:] + mass * is_more, own], -1),
        (1 - alpha) * smoothing or None,
        tail,
    )
