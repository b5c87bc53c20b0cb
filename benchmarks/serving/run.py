"""Requests to vLLM's server: a soft prompt, its context from the prefix cache, and anew.

    python benchmarks/serving/run.py MODEL_DIR PROMPT_DIR    # of make demo; after make vllm
    python benchmarks/serving/run.py --example gpl MODEL_DIR PROMPT_DIR    # of make long

An answer of one token times the reading, a longer one the writing too. The questions are the same
in all cases. The cases take turns, so that other work of the machine meets all of them.

Writes benchmarks/results/serving.json, or long_serving.json.
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
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import machine
from device import spread
from serving.questions import ANEW, CACHED, PROMPT, Question, export, questions, sizes
from serving.server import Ask, serving, vllm_command

import softprompt_fast as spf

ROOT = Path(__file__).parents[2]
FLAGS = ["--enable-prompt-embeds", "--dtype=float32"]
# The answer says how much of the prompt came from the cache.
TELL = "--enable-prompt-tokens-details"


class Load(NamedTuple):
    """What is asked at a time: each user sends the next request when the last is answered."""

    users: int
    requests: int
    answer_tokens: int = 1


@dataclass(kw_only=True, frozen=True)
class Example:
    context: str
    queries: str
    results: str
    rounds: int
    loads: dict[str, tuple[Load, ...]]
    """Of a round, by case."""


EXAMPLES = {
    "handbook": Example(
        context="handbook.md",
        queries="handbook_heldout.jsonl",
        results="serving.json",
        rounds=10,
        loads=dict.fromkeys((PROMPT, CACHED, ANEW), (Load(1, 4), Load(8, 8))),
    ),
    # One reading of this context takes a minute on two cores: 32 users would wait for half an hour.
    "gpl": Example(
        context="gpl-3.txt",
        queries="gpl_heldout.jsonl",
        results="long_serving.json",
        rounds=2,
        loads={
            **dict.fromkeys((PROMPT, CACHED), (Load(1, 4), Load(1, 2, 32), Load(32, 32, 32))),
            ANEW: (Load(1, 1), Load(1, 1, 32)),
        },
    ),
}


def timed(ask: Ask, question: Question, case: str, tokens: int) -> tuple[float, dict[str, Any]]:
    """Seconds, and what was read; only answers that begin as those of this package are timed."""
    data = json.dumps(question.body(case, tokens)).encode()
    start = time.perf_counter()
    answer = ask("/v1/completions", data)
    seconds = time.perf_counter() - start
    found, expected = answer["choices"][0]["text"].strip(), question.expected[case]
    assert found.startswith(expected), f"{case}: {found!r}, where {expected!r} is right"
    assert answer["usage"]["completion_tokens"] == tokens
    return seconds, answer["usage"]


def measure(ask: Ask, case: str, load: Load, asked: Iterator[Question]) -> dict[str, Any]:
    if case != ANEW:
        timed(ask, next(asked), case, 1)  # so that the cache has what it may have
    batch = [next(asked) for _ in range(load.requests)]
    tokens = load.answer_tokens
    with ThreadPoolExecutor(load.users) as pool:
        start = time.perf_counter()
        results = list(pool.map(lambda question: timed(ask, question, case, tokens), batch))
        seconds = time.perf_counter() - start
    details = [usage.get("prompt_tokens_details") or {} for _, usage in results]
    return {
        "seconds": [seconds for seconds, _ in results],
        "requests_per_second": len(batch) / seconds,
        "prompt_tokens": [usage["prompt_tokens"] for _, usage in results],
        "cached_tokens": [told.get("cached_tokens", 0) for told in details],
    }


def summary(case: str, load: Load, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    def every(name: str) -> list[Any]:
        return [value for one in rounds for value in one[name]]

    return {
        "reads": case,
        "users": load.users,
        "answer_tokens": load.answer_tokens,
        "requests": len(every("seconds")),
        "median_seconds": median(every("seconds")),
        "spread": spread(every("seconds")),
        "requests_per_second": median(one["requests_per_second"] for one in rounds),
        "prompt_tokens": median(every("prompt_tokens")),
        "cached_tokens": median(every("cached_tokens")),
    }


def run(ask: Ask, asked: list[Question], example: Example) -> list[dict[str, Any]]:
    rows: dict[tuple[str, Load], list[dict[str, Any]]] = {}
    in_turn = {case: itertools.cycle(asked) for case in example.loads}
    for number in range(example.rounds):
        print(f"Round {number + 1} of {example.rounds} ...", flush=True)
        for case, loads in example.loads.items():
            for load in loads:
                figures = measure(ask, case, load, in_turn[case])
                rows.setdefault((case, load), []).append(figures)
    return [summary(*key, rounds) for key, rounds in rows.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--example", choices=EXAMPLES, default="handbook")
    parser.add_argument("model", help="directory of the model, as made by make demo")
    parser.add_argument("prompt", help="directory of a prompt of the example's context")
    options = parser.parse_args()
    command = vllm_command()
    if command is None:
        raise SystemExit("vLLM is not installed: make vllm")
    load, _, _ = os.getloadavg()
    example = EXAMPLES[options.example]
    context = (ROOT / "examples" / example.context).read_text()
    queries = ROOT / "examples" / example.queries
    model, tokenizer = spf.load_model(options.model, dtype="float32", device="cpu")
    student = spf.SoftPromptModel(model, spf.SoftPrompt.from_pretrained(options.prompt))
    with tempfile.TemporaryDirectory() as directory:
        bodies = export(options.model, options.prompt, queries, Path(directory) / "exported")
        print("The right answers are computed ...", flush=True)
        asked = questions(student, tokenizer, bodies, queries, context)
        print("The server starts ...", flush=True)
        log = Path(directory) / "server.log"
        with serving(command, options.model, *FLAGS, TELL, log=log) as ask:
            version = ask("/version", None)["version"]
            rows = run(ask, asked, example)
    report = {
        "machine": machine(),
        "load_before": load,  # of other work
        "vllm": version,
        "flags": FLAGS,
        "model": Path(options.model).name,
        **sizes(student, tokenizer, context),
        "rows": rows,
    }
    results = ROOT / "benchmarks" / "results" / example.results
    results.write_text(json.dumps(report, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['reads']}, users {row['users']}, answers of {row['answer_tokens']}: "
            f"{1e3 * row['median_seconds']:.0f} ms "
            f"± {row['spread']:.0%}, {row['requests_per_second']:.2f} a second, "
            f"{row['cached_tokens']:.0f} of {row['prompt_tokens']:.0f} tokens cached"
        )


if __name__ == "__main__":
    main()
