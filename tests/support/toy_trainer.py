"""A trainer of a toy model on a few examples, and the run that it makes."""

from __future__ import annotations

import torch
from toy import make_model, make_tokenizer

from softprompt_fast.data.queries import tokenize_query
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig
from softprompt_fast.teacher.examples import TrainingExample
from softprompt_fast.teacher.teacher import Teacher
from softprompt_fast.training.trainer import SoftPromptTrainer, SoftPromptTrainingArguments

CONTEXT = "Open at 10, closed on Monday. The cat is called Spanner."
QUESTIONS = ["When?", "May I feed the cat?", "Hi", "Are you open now?"] * 4
# Answers of very different lengths: a mean of batch means would be another loss.
LENGTHS = [1, 2, 17, 3, 11, 1, 5, 2] * 2


def make_examples(model, *, record_hidden=True) -> list[TrainingExample]:
    queries = [
        tokenize_query(make_tokenizer(), [{"role": "user", "content": question}], CONTEXT)
        for question in QUESTIONS
    ]
    given = [list(range(3, 3 + length)) for length in LENGTHS]
    teacher = Teacher(model, make_tokenizer(), show_progress=False)
    answers = teacher.answer(queries, given, record_hidden=record_hidden)
    return [
        TrainingExample(query=query, answer=answer)
        for query, answer in zip(queries, answers, strict=True)
    ]


def make_trainer(
    output_dir,
    *,
    model=None,
    examples=None,
    num_virtual_tokens=4,
    placement="system",
    callbacks=None,
    **options,
):
    model = make_model() if model is None else model
    config = SoftPromptConfig(num_virtual_tokens=num_virtual_tokens, placement=placement)
    student = SoftPromptModel(
        model, SoftPrompt.from_model(model, make_tokenizer(), config, CONTEXT)
    )
    examples = make_examples(model) if examples is None else examples
    options = dict(use_cpu=True, disable_tqdm=True, max_steps=6, logging_steps=1) | options
    return SoftPromptTrainer(
        student,
        SoftPromptTrainingArguments(output_dir=str(output_dir), **options),
        train_dataset=examples,
        eval_dataset=examples[:5],
        callbacks=callbacks,
    )


def trained(trainer, **options) -> tuple[torch.Tensor, list[float]]:
    """The prompt and the losses of a run."""
    trainer.train(**options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer.model.prompt.embedding.detach(), losses
