"""What the teacher's queries cost behind a long context: time and memory, with one copy or many.

The first tokens of the GPL are the context. 16 queries are read, answered with 16 tokens each and
scored: by ``SharedReader``, whose rows share the context's keys and values, and by ``BatchReader``,
each of whose rows has its own, as with transformers' generate. Then more and more rows share them.

    python benchmarks/teacher/run.py MODEL_DIR [--tokens 500 2500 5000 7500] [--rows 1 64]

Writes benchmarks/results/teacher.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from conftest import machine
from device import peak_mib, seconds
from fresh_process import in_fresh_process

from softprompt_fast.base_model.loading import load_model
from softprompt_fast.base_model.prefix_cache import Prefix
from softprompt_fast.data.queries import text_ids
from softprompt_fast.data.records import read_jsonl, read_text
from softprompt_fast.teacher.examples import tokenize_records
from softprompt_fast.teacher.reading import BatchReader, SharedReader

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "teacher.json"
CONTEXT = ROOT / "examples" / "gpl-3.txt"
QUERIES = ROOT / "examples" / "handbook_train.jsonl"
NEW_TOKENS = 16
BATCH = 16
READERS = {"one copy": SharedReader, "a copy for each row": BatchReader}


@torch.no_grad()
def costs(model_dir: str, num_tokens: int, calls: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Of reading the context, and then of each of the calls: a reader, and how many queries.

    For a fresh process.
    """
    model, tokenizer = load_model(model_dir, device="cpu", dtype="float32")
    context = text_ids(tokenizer, read_text(CONTEXT))[:num_tokens]
    assert len(context) == num_tokens, f"{CONTEXT} has {len(context)} tokens"
    queries = tokenize_records(tokenizer, read_jsonl(QUERIES), "")
    Prefix.read(model, context[:64])  # what the first call leaves behind is not this context's
    kept: list[Prefix] = []
    found: dict[str, Any] = {"tokens": num_tokens, "calls": []}

    def read() -> None:
        kept.append(Prefix.read(model, queries[0].before + context))

    found["prefix_peak_mib"] = peak_mib(
        lambda: found.update(prefix_seconds=seconds(read)),
    )
    (prefix,) = kept
    found["prefix_mib"] = prefix.length * prefix.token_bytes / 2**20
    for name, num_rows in calls:
        reader = READERS[name](model=model, prefix=prefix, batch_size=max(num_rows, BATCH))
        answer = partial(
            reader.write,
            [query.after for query in queries[:num_rows]],
            max_new_tokens=NEW_TOKENS,
            end_ids=(),
            with_states=True,
        )
        times: list[float] = []
        peak = peak_mib(lambda answer=answer, times=times: times.append(seconds(answer)))
        call = {"reader": name, "rows": num_rows, "seconds": times[0], "peak_mib": peak}
        found["calls"].append(call)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of the model, as made by make demo")
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 2500, 5000, 7500])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64])
    options = parser.parse_args()
    rows = []
    for num_tokens in options.tokens:
        calls = [(name, BATCH) for name in READERS]
        if num_tokens == max(options.tokens):
            calls += [("one copy", number) for number in options.rows]
        with in_fresh_process(costs, options.model, num_tokens, calls) as wait:
            rows.append(wait())
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "machine": machine(),
        "model": Path(options.model).name,
        "new_tokens": NEW_TOKENS,
        "contexts": rows,
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
