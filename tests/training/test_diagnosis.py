"""The log of a training, and what is read from it: one fault at a time, and none where none is."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from toy import make_model, make_tokenizer
from toy_trainer import CONTEXT, QUESTIONS, make_examples, make_trainer, trained
from transformers import TrainerCallback

from softprompt_fast.data.records import Record
from softprompt_fast.evaluation.evaluate import evaluate
from softprompt_fast.teacher.examples import make_examples as own_examples
from softprompt_fast.teacher.teacher import Teacher
from softprompt_fast.training.baselines import Baselines
from softprompt_fast.training.diagnosis import diagnose, recovered
from softprompt_fast.training.log import TRAINING_LOG_FILE, TrainingLog


def curve(losses, *, grad_norm=0.3, learning_rate=0.02):
    return [
        {"step": i, "loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        for i, loss in enumerate(losses, 1)
    ]


# Like the run of the example.
HEALTHY = TrainingLog(
    steps=curve([0.3 - 0.004 * i for i in range(48)]),
    max_steps=48,
    warmup_steps=3,
    learning_rate=0.02,
    max_grad_norm=1.0,
    context_kl=0.5,
    loss_without_context=0.5,
    loss_with_context=0.0,
    loss_at_start=0.3,
    loss_at_end=0.11,
    prompt_change=1.0,
    answers=128,
    cut_answers=20,
    max_new_tokens=32,
)
STUCK = dict(steps=curve([0.49] * 48), loss_at_start=0.49, loss_at_end=0.48)


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        ({}, None, ""),
        (dict(context_kl=2e-6), "nothing to compress", "differ by 2e-06 nats"),
        (STUCK, "not learning", "4% of what the context does is recovered"),
        (STUCK | dict(prompt_change=2e-5), "learning rate too low", "now 0.02"),
        (dict(loss_at_end=0.34), "learning rate too high", "rose from 0.3 to 0.34"),
        (STUCK | dict(prompt_change=90.0), "learning rate too high", "by 90 times its own length"),
        (dict(not_finite_step=7, steps=[]), "learning rate too high", "not finite after step 7"),
        (
            STUCK | dict(steps=curve([0.49] * 48, grad_norm=0.0), prompt_change=0.0),
            "vanishing gradient",
            "exactly 0 in 45 of 45",
        ),
        (
            STUCK | dict(steps=curve([0.49] * 48, grad_norm=9.0)),
            "gradient always clipped",
            "in 45 of 45 steps after warm-up, 9 in half",
        ),
        (dict(cut_answers=26), "cut answers", "26 of 128 answers"),
        (dict(evaluations=[{"step": 48, "loss": 0.4}]), "overfitted", "78% .* and 20%"),
        # No faults: what would be one in a run that learns less, or that is too short to judge.
        (dict(loss_at_end=1e-9, steps=curve([1e-9] * 48, grad_norm=1e-9)), None, ""),
        (STUCK | dict(steps=curve([0.49] * 12)), None, ""),
        (dict(steps=[], answers=0, cut_answers=0), None, ""),
    ],
)
def test_each_fault_is_found_and_no_other(fault, kind, text):
    found = diagnose(replace(HEALTHY, **fault))
    assert [finding.kind for finding in found] == ([] if kind is None else [kind])
    if found:
        assert re.search(text, f"{found[0].what} {found[0].advice}")
        assert found[0].is_note == (kind == "cut answers")


def test_clipping_is_a_note_where_the_prompt_learns():
    found = diagnose(replace(HEALTHY, steps=curve([0.2] * 48, grad_norm=9.0)))
    assert [(finding.kind, finding.is_note) for finding in found] == [
        ("gradient always clipped", True)
    ]


def test_a_run_that_still_goes_on_is_judged_by_its_batches():
    young = replace(HEALTHY, loss_at_end=None, steps=curve([0.49] * 16), loss_at_start=0.49)
    assert [finding.kind for finding in diagnose(young)] == ["not learning"]
    # From far above, where the prompt began, it is on its way.
    assert diagnose(replace(young, loss_at_start=2.0)) == []
    # How far it has to have moved grows with the run.
    assert diagnose(replace(young, loss_at_start=0.6, prompt_change=0.04)) == []
    low = diagnose(replace(young, loss_at_start=0.6, prompt_change=0.03))
    assert [finding.kind for finding in low] == ["learning rate too low"]


class UpToDate(TrainerCallback):
    """The log knows the step that the Trainer logs."""

    log: TrainingLog

    def on_log(self, args, state, control, **kwargs):
        assert self.log.steps[-1]["step"] == state.global_step


@pytest.mark.parametrize("options", [{}, dict(gradient_accumulation_steps=2)], ids=["", "parts"])
def test_every_step_is_logged_as_the_trainer_logs_it(tmp_path, options):
    options |= dict(per_device_train_batch_size=2, max_steps=5)
    watch = UpToDate()
    loud = make_trainer(tmp_path, logging_steps=1, callbacks=[watch], **options)
    watch.log = loud.training_log
    quiet = make_trainer(tmp_path, logging_strategy="no", **options)
    assert torch.equal(trained(loud)[0], trained(quiet)[0])
    keys = ("step", "loss", "grad_norm", "learning_rate")
    own = [{k: e[k] for k in keys} for e in loud.state.log_history if "loss" in e]
    assert len(own) == 5
    assert quiet.training_log.steps == loud.training_log.steps == own


def test_the_log_of_a_resumed_run_holds_all_steps(tmp_path):
    options = dict(save_steps=2, logging_steps=3, eval_strategy="steps", eval_steps=2)
    undisturbed = make_trainer(tmp_path, **options)
    trained(undisturbed)
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = make_trainer(tmp_path, **options)
    trained(resumed, resume_from_checkpoint=True)
    assert resumed.training_log == undisturbed.training_log
    assert [entry["step"] for entry in resumed.training_log.evaluations] == [2, 4, 6]
    undisturbed.training_log.write(tmp_path / TRAINING_LOG_FILE)
    assert TrainingLog.read(tmp_path / TRAINING_LOG_FILE) == undisturbed.training_log


def measured(tmp_path, examples, model, **options):
    trainer = make_trainer(tmp_path, model=model, examples=examples, **options)
    teacher = Teacher(model, make_tokenizer(), show_progress=False)
    baselines = Baselines(trainer, teacher, examples)
    baselines.measure_start()
    return trainer, baselines


def test_the_baselines_are_those_of_the_evaluation(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    records = [
        Record(messages=[{"role": "user", "content": q}], completion=None, context=None, source=q)
        for q in QUESTIONS[:3]
    ]
    teacher = Teacher(model, tokenizer, max_new_tokens=4, show_progress=False)
    examples = own_examples(teacher, tokenizer, records, CONTEXT, record_hidden=True)
    trainer, _ = measured(tmp_path, examples, model)
    report = evaluate(
        model, tokenizer, trainer.model.prompt, records, CONTEXT, max_new_tokens=4, num_samples=0
    )
    rows, log = report["conditions"], trainer.training_log
    assert log.loss_without_context == pytest.approx(rows["no context"]["kl"], rel=1e-5)
    assert log.loss_at_start == pytest.approx(rows["soft prompt"]["kl"], rel=1e-5)
    assert recovered(log, log.loss_at_start) == pytest.approx(report["kl_recovered"], rel=1e-4)
    nll = measured(tmp_path, examples, model, objective="nll")[0].training_log
    assert nll.context_kl == log.context_kl
    for loss, name in (
        (nll.loss_without_context, "no context"),
        (nll.loss_with_context, "full context"),
        (nll.loss_at_start, "soft prompt"),
    ):
        assert math.exp(loss) == pytest.approx(rows[name]["perplexity"], rel=1e-5)


def test_measuring_changes_no_bit_of_the_training(tmp_path):
    model = make_model()
    examples = make_examples(model)
    plain = trained(make_trainer(tmp_path, model=model, examples=examples))
    trainer, baselines = measured(tmp_path, examples, model)
    assert torch.equal(trained(trainer)[0], plain[0])
    before = trainer.model.prompt.embedding.detach().clone()
    baselines.measure_end()
    assert torch.equal(trainer.model.prompt.embedding, before)
    assert trainer.training_log.loss_at_end < trainer.training_log.loss_at_start
