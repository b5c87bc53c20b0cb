"""A toy teacher, questions about its context, and answers that are given."""

from __future__ import annotations

from toy import make_tokenizer

from softprompt_fast.data.queries import tokenize_query
from softprompt_fast.teacher.teacher import Teacher

CONTEXT = "Open at 10, closed on Monday. The cat is called Spanner."
QUESTIONS = ["When?", "May I feed the cat after four?", "Hi", "Are you open?", "Who is Spanner?"]
ANSWERS = ["At 10.", "No.", "Hello, how are you?", "Yes", "A cat with a very long answer."]
NEW_TOKENS = 9


def make_queries(questions=QUESTIONS, context=CONTEXT):
    return [
        tokenize_query(
            make_tokenizer(), [{"role": "user", "content": question}], context, source=f"q:{line}"
        )
        for line, question in enumerate(questions, start=1)
    ]


def given_answers():
    return [make_tokenizer()(text)["input_ids"] for text in ANSWERS]


def make_teacher(model, **options) -> Teacher:
    options = {"max_new_tokens": NEW_TOKENS, "batch_size": 3, "show_progress": False, **options}
    return Teacher(model, make_tokenizer(), **options)
