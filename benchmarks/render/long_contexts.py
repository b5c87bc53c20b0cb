"""The tables of long contexts: what they cost the teacher, and a server."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from render.pictures import TEACHER_COLOURS
from render.tables import Table, other_work


def teacher_table(report: dict[str, Any]) -> str:
    """What queries cost behind a long context, from ``benchmarks/teacher/run.py``."""
    one, many = TEACHER_COLOURS
    columns = ["context", "reading it", "its keys and values", f"{one}: time", "memory"]
    columns += [f"{many}: time", "memory"]
    cells = [
        [
            f"{row['tokens']:,} tokens",
            f"{row['prefix_seconds']:.1f} s",
            f"{row['prefix_mib']:.0f} MiB",
            *(
                cell
                for call in row["calls"][:2]
                for cell in (f"{call['seconds']:.1f} s", f"{call['peak_mib']:.0f} MiB")
            ),
        ]
        for row in report["contexts"]
    ]
    longest = report["contexts"][-1]
    shared = [call for call in longest["calls"] if call["reader"] == one]
    shared.sort(key=itemgetter("rows"))
    machine = report["machine"]
    return Table("", columns, cells).with_text(
        f"{longest['calls'][0]['rows']} queries, {report['new_tokens']} tokens each, "
        f"written and scored, {report['model']} in fp32 on {machine['cores']} cores "
        f"({machine['cpu']}, {machine['instruction_set']}), beyond reading the context, the "
        f"model, and the context's keys and values. Behind {longest['tokens']:,} tokens, "
        + ", ".join(f"{call['rows']} rows take {call['peak_mib']:.0f} MiB" for call in shared)
        + "."
    )


def serving_table(report: dict[str, Any]) -> str:
    """What a long context costs a server, and the soft prompt in its place."""
    rows = {(r["reads"], r["users"], r["answer_tokens"]): r for r in report["rows"]}
    users, answer = max(row["users"] for row in report["rows"]), report["rows"][-1]["answer_tokens"]
    columns = ["the server reads", "tokens in the context's place", "their keys and values"]
    columns += ["from the cache", "first token", "tokens a second, 1 user", f"{users} users"]
    cells = []
    for name in dict.fromkeys(row["reads"] for row in report["rows"]):
        tokens = report["num_virtual_tokens" if name == "soft prompt" else "context_tokens"]
        first = rows[name, 1, 1]
        rates = [rows.get((name, count, answer)) for count in (1, users)]
        cells.append(
            [
                name,
                f"{tokens:,}",
                f"{tokens * report['key_value_bytes_per_token'] / 2**20:.1f} MiB",
                f"{first['cached_tokens']:,.0f} tokens",
                f"{first['median_seconds']:.2f} s ± {first['spread']:.0%}",
                *(f"{answer * row['requests_per_second']:.1f}" if row else "–" for row in rates),
            ]
        )
    machine, shared = report["machine"], other_work(report["load_before"])
    return Table("", columns, cells).with_text(
        f"vLLM {report['vllm']}, {report['model']} in fp32, "
        f"{report['key_value_bytes_per_token'] / 1024:.0f} KiB of keys and values a token, "
        f"{machine['cores']} cores of an {machine['cpu']}. First token: the time of an answer "
        "of one token, with one user; medians, and how far the quartiles are apart. Tokens a "
        f"second: of answers of {answer} tokens, the reading included, over all users.{shared}"
    )
