"""How far a model's predictions are from the teacher's, token by token and over all tokens.

Legend: T answer tokens, V vocabulary, p the teacher's distribution (the full context in place),
q that of the model it is compared with. KL, NLL and entropy are in nats.

The first four figures of ``summary`` are those of llama.cpp's ``--kl-divergence``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base_model.output_head import OutputHead
from ..losses.functional import linear_kl, linear_nll

# Alternatives whose ranking is compared.
TOP = 20
CALIBRATION_BINS = 10
# Shares of all tokens, for the curve of the KL's distribution: its tail is what is looked at.
QUANTILES = (0.0, *(n / 20 for n in range(1, 20)), 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
# fp32 buffers [rows, V] alive at once: logits, log-probabilities and a product, of p and of q.
BUFFERS = 6

Tokens = dict[str, Tensor]


@torch.no_grad()
def token_metrics(
    head: OutputHead,
    hidden: Mapping[str, Tensor],
    teacher_hidden: Tensor,
    targets: Tensor,
    *,
    backend: str = "auto",
    workspace_mib: float = 256,
) -> dict[str, Tokens]:
    """By the name of each of ``hidden`` [T, D], tensors [T] in fp64 on the CPU:

    kl: KL(p || q)    nll, teacher_nll: -log q, -log p of the target    entropy: of q
    agrees: 1 where both think the same token most probable
    confidence: q of the token that q thinks most probable; teacher_confidence: p of that token
    rank_correlation: ``spearman(log_p, log_q)``
    """
    device = head.weight.device
    loss: dict[str, Any] = {"backend": backend, "workspace_mib": workspace_mib, "reduction": "none"}
    loss |= head.loss_options()
    teacher_hidden, targets = teacher_hidden.to(device), targets.to(device)
    states = {name: value.to(device) for name, value in hidden.items()}
    teacher_nll = linear_nll(teacher_hidden, head.weight, targets, **loss)
    result = {
        name: {
            "kl": linear_kl(value, head.weight, teacher_hidden, **loss),
            "nll": linear_nll(value, head.weight, targets, **loss),
            "teacher_nll": teacher_nll,
        }
        for name, value in states.items()
    }
    compared: dict[str, list[Tokens]] = {name: [] for name in states}
    for rows in _chunks(len(targets), len(head.weight), workspace_mib):
        log_p = head.logits(teacher_hidden[rows]).log_softmax(-1)
        for name, value in states.items():
            log_q = head.logits(value[rows]).log_softmax(-1)
            compared[name].append(compare(log_p, log_q))
    for name, parts in compared.items():
        result[name] |= {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return {n: {k: v.double().cpu() for k, v in tokens.items()} for n, tokens in result.items()}


def compare(log_p: Tensor, log_q: Tensor) -> Tokens:
    """What needs whole distributions [C, V], see ``token_metrics``."""
    own = log_q.argmax(-1, keepdim=True)
    return {
        "agrees": (own == log_p.argmax(-1, keepdim=True)).squeeze(-1),
        "entropy": entropy(log_q),
        "confidence": log_q.gather(-1, own).exp().squeeze(-1),
        "teacher_confidence": log_p.gather(-1, own).exp().squeeze(-1),
        "rank_correlation": spearman(log_p, log_q),
    }


def entropy(log_q: Tensor) -> Tensor:
    """[..., V] -> [...]. An entry without probability contributes nothing."""
    return -(log_q.exp() * log_q.clamp(min=torch.finfo(log_q.dtype).min)).sum(-1)


def spearman(log_p: Tensor, log_q: Tensor, top: int = TOP) -> Tensor:
    """Spearman's rank correlation over p's ``top`` most probable entries.    [..., V] -> [...]

    Equal values share the mean of their ranks. NaN where all values of one side are equal: such a
    ranking says nothing.
    """
    best = log_p.topk(min(top, log_p.shape[-1]), dim=-1)
    a, b = _centred_ranks(best.values), _centred_ranks(log_q.gather(-1, best.indices))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def _centred_ranks(values: Tensor) -> Tensor:
    """Ranks minus their mean, doubled: how many are smaller less how many are larger."""
    one, other = values.unsqueeze(-1), values.unsqueeze(-2)
    return ((one > other).double() - (one < other).double()).sum(-1)


def summary(tokens: Tokens, lengths: Sequence[int]) -> dict[str, Any]:
    """The figures over all tokens, as JSON values.    lengths: tokens of each answer

    kl, kl_standard_error: mean, and its standard error over answers
    kl_median, kl_99, kl_999, kl_max: of its distribution over tokens
    top1_agreement: how often both think the same token most probable
    rms_delta_p: of q(target) - p(target)
    perplexity, perplexity_ratio: of the answers, and divided by the teacher's
    entropy: mean    calibration_error: see ``calibration``
    rank_correlation: mean of ``spearman`` where it is defined, None where it nowhere is
    """
    kl, nll, teacher_nll = tokens["kl"], tokens["nll"], tokens["teacher_nll"]
    ranked = tokens["rank_correlation"][tokens["rank_correlation"].isfinite()]
    bins = calibration(tokens)
    median, most, nearly_all = quantiles(kl, (0.5, 0.99, 0.999))
    return {
        "kl": kl.mean().item(),
        "kl_standard_error": clustered_standard_error(kl, lengths),
        "kl_median": median,
        "kl_99": most,
        "kl_999": nearly_all,
        "kl_max": kl.max().item(),
        "top1_agreement": tokens["agrees"].mean().item(),
        "rms_delta_p": ((-nll).exp() - (-teacher_nll).exp()).square().mean().sqrt().item(),
        "perplexity": nll.mean().exp().item(),
        "perplexity_ratio": (nll - teacher_nll).mean().exp().item(),
        "entropy": tokens["entropy"].mean().item(),
        "calibration_error": sum(
            b["tokens"] * abs(b["confidence"] - b["teacher_confidence"]) for b in bins
        )
        / len(kl),
        "rank_correlation": ranked.mean().item() if len(ranked) else None,
    }


def series(tokens: Tokens, lengths: Sequence[int]) -> dict[str, Any]:
    """What is drawn and not only told, as JSON values.

    kl_by_position, entropy_by_position: means over the answers that are so long
    kl_quantiles: at QUANTILES    calibration: its bins
    """
    return {
        "kl_by_position": by_position(tokens["kl"], lengths),
        "entropy_by_position": by_position(tokens["entropy"], lengths),
        "kl_quantiles": quantiles(tokens["kl"], QUANTILES),
        "calibration": calibration(tokens),
    }


def calibration(tokens: Tokens) -> list[dict[str, Any]]:
    """Tokens by q's confidence, in CALIBRATION_BINS bins of equal width; the empty ones left out.

    q is as sure as the teacher where the means of both sides are equal: of q of the token that q
    thinks most probable, and of p of the same token. ``summary``'s calibration_error is the mean
    difference over all tokens: an expected calibration error, with the teacher's probability in
    the place of what happened.
    """
    confidence = tokens["confidence"]
    places = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    return [
        {
            "tokens": int(inside.sum()),
            "confidence": confidence[inside].mean().item(),
            "teacher_confidence": tokens["teacher_confidence"][inside].mean().item(),
        }
        for inside in (places == place for place in range(CALIBRATION_BINS))
        if inside.any()
    ]


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Between two values, by linear interpolation. ``torch.quantile`` ends at 16 million values."""
    ordered = values.sort().values
    places = torch.tensor(shares, dtype=torch.float64) * (len(ordered) - 1)
    low, high = ordered[places.floor().long()], ordered[places.ceil().long()]
    return torch.lerp(low, high, places - places.floor()).tolist()


def by_position(values: Tensor, lengths: Sequence[int]) -> list[float]:
    """The mean over all answers at their first token, at their second, and so on."""
    parts = values.split(list(lengths))
    padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    return (padded.sum(0) / torch.tensor(tokens_by_position(lengths))).tolist()


def tokens_by_position(lengths: Sequence[int]) -> list[int]:
    """How many answers have a first token, a second, and so on."""
    return [sum(length > place for length in lengths) for place in range(max(lengths))]


def clustered_standard_error(values: Tensor, lengths: Sequence[int]) -> float | None:
    """Of the mean of ``values`` [T], whose first lengths[0] entries belong together, and so on.

    The ratio estimator of survey sampling (Cochran, Sampling Techniques, 1977, section 2.11);
    None for one cluster.
    """
    clusters = len(lengths)
    if clusters < 2:
        return None
    sums = torch.stack([part.sum() for part in values.split(list(lengths))])
    residuals = sums - values.mean() * torch.as_tensor(lengths)
    variance = residuals.square().sum() * clusters / (clusters - 1)
    return math.sqrt(variance.item()) / len(values)


def _chunks(tokens: int, vocabulary: int, workspace_mib: float) -> Iterator[slice]:
    rows = max(1, int(workspace_mib * 2**20 / (4 * BUFFERS * vocabulary)))
    return (slice(start, start + rows) for start in range(0, tokens, rows))
