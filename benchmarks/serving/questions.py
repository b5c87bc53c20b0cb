"""What the server is asked: each question with a soft prompt, and with the context in its place."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import softprompt_fast as spf
from softprompt_fast.cli.main import main as softprompt_fast
from softprompt_fast.data.queries import teacher_ids
from softprompt_fast.utils.text import answer_text

PROMPT, CACHED, ANEW = "soft prompt", "full context, cached", "full context, anew"

Body = dict[str, Any]


@dataclass(kw_only=True, frozen=True)
class Question:
    """One question in each case, and the first token of the right answers as text."""

    bodies: dict[str, Body]
    """Of PROMPT and of CACHED."""

    expected: dict[str, str]

    def body(self, case: str, answer_tokens: int) -> Body:
        """With an answer of so many tokens, wherever the model would end it."""
        length = {"max_tokens": answer_tokens, "stop_token_ids": [], "ignore_eos": True}
        if case != ANEW:
            return {**self.bodies[case], **length}
        # Blocks are shared only by requests that have the same salt.
        return {**self.bodies[CACHED], **length, "cache_salt": os.urandom(8).hex()}


def export(model_dir: str, prompt_dir: str, query_file: Path, out: Path) -> list[Body]:
    paths = {"model": model_dir, "prompt_dir": prompt_dir, "output_dir": out}
    flags = [f"--{name}={value}" for name, value in paths.items()]
    flags += [f"--query_file={query_file}", "--to=vllm", "--max_new_tokens=1"]
    if softprompt_fast(["export", *flags]) != 0:
        raise SystemExit("the prompt cannot be exported")
    return [json.loads(path.read_text()) for path in sorted(out.glob("completion-*.json"))]


def questions(
    student: Any, tokenizer: Any, bodies: list[Body], query_file: Path, context: str
) -> list[Question]:
    queries = [
        spf.tokenize_query(tokenizer, record.messages, context)
        for record in spf.read_jsonl(query_file)
    ]
    quiet = {"max_new_tokens": 1, "show_progress": False}
    by_prompt = spf.generate(student, tokenizer, queries, **quiet)
    teacher = spf.Teacher(student.base, tokenizer, **quiet)
    made = []
    for query, body, first, answer in zip(
        queries, bodies, by_prompt, teacher.answer(queries), strict=True
    ):
        options = {k: v for k, v in body.items() if k != "prompt_embeds"}
        by_context = answer_text(tokenizer, answer.ids)
        made.append(
            Question(
                bodies={PROMPT: body, CACHED: {"prompt": teacher_ids(query), **options}},
                expected={PROMPT: first, CACHED: by_context, ANEW: by_context},
            )
        )
    return made


def sizes(student: Any, tokenizer: Any, context: str) -> dict[str, int]:
    config = student.base.config
    query = spf.tokenize_query(tokenizer, [{"role": "user", "content": "?"}], context)
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "num_virtual_tokens": student.prompt.config.num_virtual_tokens,
        "context_tokens": len(query.context),
        "key_value_bytes_per_token": 4 * values,  # fp32
    }
