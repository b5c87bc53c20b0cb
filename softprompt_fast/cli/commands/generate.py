"""The command ``generate``: answer one question with a soft prompt."""

from __future__ import annotations

import sys

from ...data.queries import tokenize_query
from ...student.model import SoftPromptModel
from ...training.run_directory import read_run
from ..command import Argument, Command, Invocation
from ..saved_prompt import PromptOptions, load_prompt, recorded_inputs, tell_answer


def answer_question(options: PromptOptions, invocation: Invocation) -> int:
    """Prints the answer to the question, or to what stdin holds, while it is written."""
    question = invocation.argument
    if question is None:
        try:
            question = sys.stdin.read()
            question.encode()  # what Python could not decode may be here as half a surrogate pair
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise ValueError(f"the question is not UTF-8: see character {error.start}") from None
    if not question.strip():
        raise ValueError("the question is empty")
    inputs = recorded_inputs(options, read_run(options.prompt_dir))
    model, tokenizer, prompt = load_prompt(options, inputs)
    query = tokenize_query(tokenizer, [{"role": "user", "content": question.strip()}], "")
    tell_answer(SoftPromptModel(model, prompt), tokenizer, query, inputs["max_new_tokens"])
    return 0


COMMAND = Command(
    description="Answer a question with a soft prompt.",
    options=(PromptOptions,),
    run=answer_question,
    argument=Argument(name="question", help="without it, the question is read from stdin"),
)
