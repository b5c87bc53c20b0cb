"""A random prompt of a toy model, held-out questions, and their evaluation."""

from __future__ import annotations

from toy import make_tokenizer
from toy_run import CONTEXT, HELD_OUT, NEW_TOKENS

from softprompt_fast.data.records import Record
from softprompt_fast.evaluation.evaluate import evaluate
from softprompt_fast.student.soft_prompt import SoftPrompt, SoftPromptConfig

P = 4


def make_records(questions=HELD_OUT, completion=None):
    return [
        Record(
            messages=[{"role": "user", "content": question}],
            completion=completion,
            context=None,
            source=f"held:{line}",
        )
        for line, question in enumerate(questions, start=1)
    ]


def make_prompt(model, **options):
    options = {"num_virtual_tokens": P, "prompt_tuning_init": "random", **options}
    return SoftPrompt.from_model(model, make_tokenizer(), SoftPromptConfig(**options), CONTEXT)


def run(model, prompt, records=None, **options):
    return evaluate(
        model,
        make_tokenizer(),
        prompt,
        make_records() if records is None else records,
        CONTEXT,
        **{"max_new_tokens": NEW_TOKENS, "batch_size": 2, "show_progress": False, **options},
    )
