"""The metrics of a report on distributions made by hand, whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt_fast.base_model.output_head import OutputHead
from softprompt_fast.evaluation import metrics
from softprompt_fast.evaluation.metrics import (
    QUANTILES,
    by_position,
    calibration,
    clustered_standard_error,
    quantiles,
    series,
    spearman,
    summary,
    token_metrics,
)

# Four answer tokens over a vocabulary of four. The second model answers as the first one does, is
# a little off, has two tokens exchanged, and is sure of the wrong one.
TEACHER = [
    [0.5, 0.25, 0.125, 0.125],
    [0.5, 0.5, 0, 0],
    [0.6, 0.3, 0.08, 0.02],
    [0.7, 0.1, 0.1, 0.1],
]
STUDENT = [
    [0.5, 0.25, 0.125, 0.125],
    [0.25, 0.75, 0, 0],
    [0.3, 0.6, 0.08, 0.02],
    [0.1, 0.7, 0.1, 0.1],
]
TARGETS = [0, 0, 0, 0]
LENGTHS = [1, 3]
KL = [
    0.0,
    0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
    0.6 * math.log(2) - 0.3 * math.log(2),
    0.7 * math.log(7) - 0.1 * math.log(7),
]


def tokens_of(teacher=TEACHER, student=STUDENT, targets=TARGETS, **options):
    """Through the whole way: with the unit matrix as a head, hidden states are logits."""

    def logits(rows):
        return torch.tensor(rows, dtype=torch.float64).log().clamp(min=-1e4).float()

    head = OutputHead(weight=torch.eye(len(teacher[0])))
    return token_metrics(
        head,
        {"student": logits(student)},
        logits(teacher),
        torch.tensor(targets),
        **{"backend": "torch", **options},
    )["student"]


def near(value):
    return pytest.approx(value, rel=1e-5, abs=1e-6)


def test_the_figures_of_distributions_made_by_hand():
    tokens = tokens_of()
    assert tokens["kl"].tolist() == near(KL)
    row = summary(tokens, LENGTHS)
    assert row["kl"] == near(sum(KL) / 4)
    ordered = sorted(KL)
    assert row["kl_median"] == near((ordered[1] + ordered[2]) / 2)
    assert row["kl_99"] == near(ordered[2] + 0.97 * (ordered[3] - ordered[2]))
    assert row["kl_999"] == near(ordered[2] + 0.997 * (ordered[3] - ordered[2]))
    assert row["kl_max"] == near(ordered[3])
    # the second model's first choices are 0, 1, 1, 1, the teacher's 0, 0 (the first of two), 0, 0
    assert row["top1_agreement"] == 0.25
    assert row["rms_delta_p"] == near(math.sqrt((0 + 0.25**2 + 0.3**2 + 0.6**2) / 4))
    assert row["perplexity"] == near((0.5 * 0.25 * 0.3 * 0.1) ** -0.25)
    assert row["perplexity_ratio"] == near(
        (0.5 * 0.5 * 0.6 * 0.7 / (0.5 * 0.25 * 0.3 * 0.1)) ** 0.25
    )
    entropies = [-sum(q * math.log(q) for q in row if q) for row in STUDENT]
    assert row["entropy"] == near(sum(entropies) / 4)
    # its first choices have 0.5, 0.75, 0.6 and 0.7, and the teacher gives them 0.5, 0.5, 0.3, 0.1
    assert row["calibration_error"] == near((0 + (0.25 + 0.6) + 0.3) / 4)
    assert calibration(tokens) == [
        {"tokens": 1, "confidence": near(0.5), "teacher_confidence": near(0.5)},
        {"tokens": 1, "confidence": near(0.6), "teacher_confidence": near(0.3)},
        {"tokens": 2, "confidence": near(0.725), "teacher_confidence": near(0.3)},
    ]


def test_the_rank_correlation_of_distributions_made_by_hand():
    log_p = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()

    def of(*q):
        return spearman(log_p, torch.tensor([q]).log()).item()

    assert of(0.7, 0.2, 0.06, 0.04) == near(1)  # whatever the probabilities are
    assert of(0.1, 0.2, 0.3, 0.4) == near(-1)
    assert of(0.3, 0.4, 0.2, 0.1) == near(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert of(0.4, 0.4, 0.1, 0.1) == near(4 / math.sqrt(5 * 4))  # ranks 1.5, 1.5, 3.5, 3.5
    assert math.isnan(of(0.25, 0.25, 0.25, 0.25))
    # what lies beyond the teacher's top has no part in it
    assert spearman(log_p, log_p[:, [0, 1, 3, 2]], top=2).item() == near(1)
    undefined = tokens_of(teacher=[[0.5, 0.5]], student=[[0.4, 0.6]], targets=[0])
    assert summary(undefined, [1])["rank_correlation"] is None
    assert summary(tokens_of(), LENGTHS)["rank_correlation"] == near(
        # ranks 4, 3, 1.5, 1.5 twice; 3.5, 3.5, 1.5, 1.5 with 3, 4, 1.5, 1.5; one exchange; and
        # 4, 2, 2, 2 with 2, 4, 2, 2
        (1 + 4 / math.sqrt(4 * 4.5) + 0.8 + -1 / 3) / 4
    )


def test_a_model_that_is_the_teacher_differs_in_nothing():
    row = summary(tokens_of(student=TEACHER), LENGTHS)
    assert row["kl_max"] <= 1e-6
    for name in ("rms_delta_p", "calibration_error", "kl_standard_error"):
        assert row[name] == near(0)
    for name in ("top1_agreement", "perplexity_ratio", "rank_correlation"):
        assert row[name] == near(1)


def test_chunks_change_nothing(monkeypatch):
    everything = tokens_of()
    monkeypatch.setattr(metrics, "BUFFERS", 2**30)
    one_row = tokens_of()
    assert all(torch.equal(everything[name], one_row[name]) for name in everything)


def test_means_by_position_are_over_the_answers_that_are_so_long():
    values = torch.tensor([1.0, 3.0, 5.0, 7.0], dtype=torch.float64)
    assert by_position(values, LENGTHS) == [2.0, 5.0, 7.0]
    drawn = series(tokens_of(), LENGTHS)
    assert drawn["kl_by_position"] == near([(KL[0] + KL[1]) / 2, KL[2], KL[3]])
    assert len(drawn["kl_quantiles"]) == len(QUANTILES)


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=40),
    st.lists(st.floats(0, 1), min_size=1, max_size=5),
)
def test_quantiles_are_those_of_torch(values, shares):
    tensor = torch.tensor(values, dtype=torch.float64)
    expected = torch.quantile(tensor, torch.tensor(shares, dtype=torch.float64))
    assert quantiles(tensor, shares) == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-9)


def test_the_standard_error_counts_an_answer_as_one_observation():
    values = torch.tensor([1.0, 3.0, 2.0, 8.0, 5.0, 5.0], dtype=torch.float64)
    means = values.view(3, 2).mean(1)
    expected = (means.std() / 3**0.5).item()
    error = clustered_standard_error(values, torch.tensor([2, 2, 2]))
    assert error == pytest.approx(expected)
    # The same observations again and again carry no news.
    again = clustered_standard_error(values.repeat_interleave(5), torch.tensor([10, 10, 10]))
    assert again == pytest.approx(expected)
    assert clustered_standard_error(values, torch.tensor([6])) is None
