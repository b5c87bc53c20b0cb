"""Requests to vLLM's server: a soft prompt, its context from the prefix cache, and anew.

    python benchmarks/serving/run.py MODEL_DIR PROMPT_DIR    # of make demo; after make vllm

An answer has one token: what is timed is the reading. Each question is the same in all cases. The
cases take turns, so that other work of the machine meets all of them.

Writes benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from conftest import machine
from device import spread
from serving.server import Ask, serving, vllm_command

import softprompt_fast as spf
from softprompt_fast.base_model.decoding import end_ids, write
from softprompt_fast.cli.main import main as softprompt_fast
from softprompt_fast.data.queries import teacher_ids
from softprompt_fast.utils.text import answer_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
CONTEXT, QUERIES = ROOT / "examples" / "handbook.md", ROOT / "examples" / "handbook_heldout.jsonl"
FLAGS = ["--enable-prompt-embeds", "--dtype=float32"]
# The answer says how much of the prompt came from the cache.
TELL = "--enable-prompt-tokens-details"
PROMPT, CACHED, ANEW = "soft prompt", "full context, cached", "full context, anew"
QUESTIONS, ROUNDS = 8, 10
REQUESTS = {1: 4, 8: 8}  # of a round, by how many users send them

Body = dict[str, Any]


class Question:
    """One question in each case, and the first token of the right answers as text."""

    def __init__(self, body: Body, ids: list[int], expected: dict[str, str]) -> None:
        """body: of the soft prompt. ids: with the context in its place."""
        options = {k: v for k, v in body.items() if k != "prompt_embeds"}
        self.bodies = {PROMPT: body, CACHED: {"prompt": ids, **options}}
        self.expected = expected

    def body(self, case: str) -> Body:
        if case != ANEW:
            return self.bodies[case]
        # Blocks are shared only by requests that have the same salt.
        return {**self.bodies[CACHED], "cache_salt": os.urandom(8).hex()}


def export(model_dir: str, prompt_dir: str, out: Path) -> list[Body]:
    paths = {"model": model_dir, "prompt_dir": prompt_dir, "output_dir": out, "query_file": QUERIES}
    flags = [f"--{name}={value}" for name, value in paths.items()]
    if softprompt_fast(["export", "--to=vllm", "--max_new_tokens=1", *flags]) != 0:
        raise SystemExit("the prompt cannot be exported")
    return [
        json.loads(path.read_text()) for path in sorted(out.glob("completion-*.json"))[:QUESTIONS]
    ]


def questions(student: Any, tokenizer: Any, bodies: list[Body]) -> list[Question]:
    context, ends = CONTEXT.read_text(), end_ids(student.base, tokenizer)
    made = []
    for record, body in zip(spf.read_jsonl(QUERIES)[:QUESTIONS], bodies, strict=True):
        query = spf.tokenize_query(tokenizer, record.messages, context)
        (by_prompt,) = spf.generate(
            student, tokenizer, [query], max_new_tokens=1, show_progress=False
        )
        ids = teacher_ids(query)
        row = torch.tensor([ids])
        ((token,),) = write(student.base, row, torch.ones_like(row), max_new_tokens=1, end_ids=ends)
        by_context = answer_text(tokenizer, [token])
        expected = {PROMPT: by_prompt, CACHED: by_context, ANEW: by_context}
        made.append(Question(body, ids, expected))
    return made


def sizes(student: Any, tokenizer: Any) -> dict[str, int]:
    config, context = student.base.config, CONTEXT.read_text()
    query = spf.tokenize_query(tokenizer, [{"role": "user", "content": "?"}], context)
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "num_virtual_tokens": student.prompt.config.num_virtual_tokens,
        "context_tokens": len(query.context),
        "key_value_bytes_per_token": 4 * values,  # fp32
    }


def timed(ask: Ask, question: Question, case: str) -> tuple[float, dict[str, Any]]:
    """Seconds, and what was read; only the answers that this package gives are timed."""
    data = json.dumps(question.body(case)).encode()
    start = time.perf_counter()
    answer = ask("/v1/completions", data)
    seconds = time.perf_counter() - start
    found, expected = answer["choices"][0]["text"].strip(), question.expected[case]
    assert found == expected, f"{case}: {found!r}, where {expected!r} is right"
    return seconds, answer["usage"]


def measure(ask: Ask, case: str, users: int, asked: Iterator[Question]) -> dict[str, Any]:
    """A round: each user sends the next request when the last is answered."""
    timed(ask, next(asked), case)  # so that the cache has what it may have
    batch = [next(asked) for _ in range(REQUESTS[users])]
    with ThreadPoolExecutor(users) as pool:
        start = time.perf_counter()
        results = list(pool.map(lambda question: timed(ask, question, case), batch))
        seconds = time.perf_counter() - start
    details = [usage.get("prompt_tokens_details") or {} for _, usage in results]
    return {
        "seconds": [seconds for seconds, _ in results],
        "requests_per_second": len(batch) / seconds,
        "prompt_tokens": [usage["prompt_tokens"] for _, usage in results],
        "cached_tokens": [told.get("cached_tokens", 0) for told in details],
    }


def summary(case: str, users: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def every(name: str) -> list[Any]:
        return [value for one in rounds for value in one[name]]

    return {
        "reads": case,
        "users": users,
        "requests": len(every("seconds")),
        "median_seconds": median(every("seconds")),
        "spread": spread(every("seconds")),
        "requests_per_second": median(one["requests_per_second"] for one in rounds),
        "prompt_tokens": median(every("prompt_tokens")),
        "cached_tokens": median(every("cached_tokens")),
    }


def run(ask: Ask, asked: list[Question]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    in_turn = {case: itertools.cycle(asked) for case in (PROMPT, CACHED, ANEW)}
    for number in range(ROUNDS):
        print(f"Round {number + 1} of {ROUNDS} ...", flush=True)
        for users, (case, questions) in itertools.product(REQUESTS, in_turn.items()):
            rows.setdefault((case, users), []).append(measure(ask, case, users, questions))
    return [summary(*key, rounds) for key, rounds in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of the model, as made by make demo")
    parser.add_argument("prompt", help="directory of a prompt of examples/handbook.md")
    options = parser.parse_args()
    command = vllm_command()
    if command is None:
        raise SystemExit("vLLM is not installed: make vllm")
    load, _, _ = os.getloadavg()
    model, tokenizer = spf.load_model(options.model, dtype="float32", device="cpu")
    student = spf.SoftPromptModel(model, spf.SoftPrompt.from_pretrained(options.prompt))
    with tempfile.TemporaryDirectory() as directory:
        bodies = export(options.model, options.prompt, Path(directory) / "exported")
        asked = questions(student, tokenizer, bodies)
        print("The server starts ...", flush=True)
        log = Path(directory) / "server.log"
        with serving(command, options.model, *FLAGS, TELL, log=log) as ask:
            version = ask("/version", None)["version"]
            rows = run(ask, asked)
    report = {
        "machine": machine(),
        "load_before": load,  # of other work
        "vllm": version,
        "flags": FLAGS,
        "model": Path(options.model).name,
        **sizes(student, tokenizer),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['reads']}, users {row['users']}: {1e3 * row['median_seconds']:.0f} ms "
            f"± {row['spread']:.0%}, {row['requests_per_second']:.2f} a second, "
            f"{row['cached_tokens']:.0f} of {row['prompt_tokens']:.0f} tokens cached"
        )


if __name__ == "__main__":
    main()
