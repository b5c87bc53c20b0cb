"""On the real model, each objective reaches one of the two goals and misses the other."""

from __future__ import annotations

import json

import choose_objective
import pytest
import torch
from objective_measures import ranking
from toy_run import save_toy_model

pytestmark = pytest.mark.xdist_group("choose_objective")  # one training for all of them


@pytest.fixture(scope="module")
def run(real_model, tmp_path_factory):
    """The report, and the directory it was written to."""
    output = tmp_path_factory.mktemp("choose_objective") / "output"
    # Four steps fewer than in the documentation: the same findings in less time.
    flags = ["--model", str(real_model), "--output", str(output), "--steps", "16"]
    return choose_objective.main(flags), output


def test_the_teacher_is_the_textbooks(run):
    teacher = run[0]["teacher"]
    assert teacher["right"] == pytest.approx(0.6, abs=0.05)
    assert teacher["wrong"] == pytest.approx(0.3, abs=0.05)


def test_kl_keeps_the_distribution_and_does_not_reach_95_percent(run):
    teacher, kl, nll = (run[0][name] for name in ("teacher", "kl", "nll"))
    assert kl["right"] == pytest.approx(teacher["right"], abs=0.03)
    assert kl["wrong"] == pytest.approx(teacher["wrong"], abs=0.03)
    assert kl["ranking"] > 0.8
    assert kl["place"] == teacher["place"] == 2
    assert kl["entropy"] == pytest.approx(teacher["entropy"], rel=0.2)
    assert kl["kl"] < nll["kl"] / 5


def test_nll_passes_95_percent_and_loses_the_ranking(run):
    teacher, kl, nll = (run[0][name] for name in ("teacher", "kl", "nll"))
    assert nll["right"] > 0.95
    assert nll["wrong"] < 0.03
    assert nll["ranking"] < kl["ranking"] - 0.1
    assert nll["place"] > 2
    assert nll["entropy"] < teacher["entropy"] / 4


def test_the_vectors_move_away_from_the_contexts_while_kl_falls(run):
    path = run[0]["kl"]["path"]
    distances = [point["distance"] for point in path]
    assert distances[0] == 0  # it starts as the context's own first tokens
    assert distances == sorted(set(distances))
    assert distances[-1] > 1
    assert path[-1]["kl"] < path[0]["kl"] / 3


def test_the_report_and_the_picture_are_written(run):
    report, output = run
    written = json.loads((output / "choose_objective.json").read_text())
    assert written["kl"] == report["kl"]
    assert (output / "choose_objective.png").read_bytes().startswith(b"\x89PNG")


def test_another_model_is_refused_before_training(tmp_path):
    model = save_toy_model(tmp_path / "toy")
    with pytest.raises(ValueError, match="--model must name a day in one token"):
        choose_objective.main(["--model", str(model)])


def test_the_ranking_is_spearmans_and_leaves_the_right_answer_out():
    """Over the teacher's wrong tokens alone: what the right one has does not matter."""
    log_p = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    right = int(log_p[0].argmax())
    shifted = log_p.clone()
    shifted[:, right] -= 50
    assert ranking(log_p, log_p, right) == pytest.approx(1)
    assert ranking(log_p, shifted, right) == pytest.approx(1)
    assert ranking(log_p, -log_p, right) == pytest.approx(-1)
