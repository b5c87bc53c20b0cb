"""Answers with a soft prompt. That they are the right ones is part of test_evaluate.py."""

from __future__ import annotations

import pytest
import torch
from toy import PADDING_SENSITIVE, make_model, make_tokenizer
from toy_run import CONTEXT, NEW_TOKENS, QUESTIONS

from softprompt_fast.generate import generate
from softprompt_fast.model import SoftPromptModel
from softprompt_fast.prompting import tokenize_query
from softprompt_fast.soft_prompt import SoftPrompt, SoftPromptConfig


def make_student(model, num_virtual_tokens=4, **options):
    config = SoftPromptConfig(
        num_virtual_tokens=num_virtual_tokens, prompt_tuning_init="random", **options
    )
    return SoftPromptModel(model, SoftPrompt.from_model(model, make_tokenizer(), config))


def answers(student, questions=QUESTIONS, **options):
    queries = [
        tokenize_query(make_tokenizer(), [{"role": "user", "content": q}], CONTEXT, source=f"q:{i}")
        for i, q in enumerate(questions)
    ]
    options = {"max_new_tokens": NEW_TOKENS, "show_progress": False, **options}
    return generate(student, make_tokenizer(), queries, **options)


@pytest.mark.parametrize("placement", ["system", "prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "falcon_h1", *PADDING_SENSITIVE])
def test_answers_do_not_depend_on_the_batch(architecture, placement):
    student = make_student(make_model(architecture), placement=placement)
    together = answers(student, batch_size=5)
    assert together == [answers(student, [question])[0] for question in QUESTIONS]
    assert len(set(together)) > 1


def test_the_checkpoints_own_defaults_change_no_answer():
    student = make_student(make_model())
    expected = answers(student)
    student.base.generation_config.update(use_cache=False, suppress_tokens=list(range(100)))
    assert answers(student) == expected


def test_answers_read_the_prompt_and_leave_no_trace_in_the_model():
    student = make_student(make_model("falcon_h1"))
    before = answers(student)
    with torch.no_grad():
        student.prompt.embedding.neg_()
    assert answers(student) != before
    assert not student.base.get_input_embeddings()._forward_hooks


def test_a_model_that_never_calls_its_embedding_layer_is_named(monkeypatch):
    """A prompt that nobody reads would be a silent error."""
    student = make_student(make_model())
    written = torch.zeros(1, 99, dtype=torch.long)
    monkeypatch.setattr(student.base, "generate", lambda **inputs: written)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not read all ids through its inp"):
        answers(student, ["Hi"])


def test_a_prompt_longer_than_the_model_is_named():
    student = make_student(make_model("gpt2"), num_virtual_tokens=490)
    with pytest.raises(ValueError, match="q:0: 490 virtual tokens, .* 512 positions"):
        answers(student, ["Hi"])
