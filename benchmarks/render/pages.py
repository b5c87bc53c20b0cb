"""Writes every figure of README.md and docs/ from the files in benchmarks/results/.

    python benchmarks/render/pages.py [DIRECTORY...]  # first keeps the figures of a run or sweep

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; pictures go to docs/images/.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "examples"))
import objective_report
from cases import DTYPES, HEADS, MAIN
from gpu import results as gpu_results
from render import long_contexts, pictures, prefix_memory, tables

from softprompt_fast.data.chunks import CHUNK_TOKENS
from softprompt_fast.evaluation.baselines import CONDITIONS
from softprompt_fast.evaluation.report import plots
from softprompt_fast.evaluation.report.tables import kl_with_error
from softprompt_fast.sweep.plot import curve_picture
from softprompt_fast.sweep.table import curve_cells

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLAIN = "Trainer, PEFT, F.kl_div"
STORED = "KL, stored teacher"
# What the results of an example are called, by its context.
EXAMPLES = {"handbook.md": "handbook", "gpl-3.txt": "long"}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def example_of(options: dict[str, Any]) -> str:
    """Of a run or a sweep, by the context that its options name."""
    for file, name in EXAMPLES.items():
        context = (ROOT / "examples" / file).read_bytes()
        if hashlib.sha256(context).hexdigest() == options["context_file_sha256"]:
            return name
    raise SystemExit(f"Only runs of {', '.join(EXAMPLES)} are kept, as the files are now.")


def keep_run(directory: Path) -> None:
    """The figures of a finished and evaluated run, without the paths of the machine it ran on."""
    report = json.loads((directory / "evaluation.json").read_text())
    run = json.loads((directory / "run.json").read_text())
    name = example_of(run["options"])
    report["model"] = Path(report["model"]).name
    kept = {
        f"{name}.json": {k: v for k, v in report.items() if not k.endswith("_file")},
        f"{name}_run.json": {
            **{k: run[k] for k in ("objective", "steps", "seconds", "versions")},
            "options": {k: v for k, v in run["options"].items() if k != "model"},
        },
    }
    for file, value in kept.items():
        (RESULTS / file).write_text(json.dumps(value, indent=1) + "\n")


def keep_sweep(directory: Path) -> None:
    """The curve of a finished sweep, without the paths of the machine it ran on."""
    curve = json.loads((directory / "sweep.json").read_text())
    file = "sweep.json" if example_of(curve["options"]) == "handbook" else "long_sweep.json"
    curve["model"] = Path(curve["model"]).name
    curve["options"] = {k: v for k, v in curve["options"].items() if k != "model"}
    (RESULTS / file).write_text(json.dumps(curve, indent=1) + "\n")


def faithfulness_table(example: str = "handbook") -> str:
    """What each condition of the example knows of the full context."""
    report = read(f"{example}.json")
    P, context = report["num_virtual_tokens"], report["context_tokens"]
    sizes = {
        "full context": context,
        "no context": 0,
        "cut context": P,
        "pruned context": P,
        "retrieved chunk": f"up to {CHUNK_TOKENS}",
        "soft prompt": P,
    }
    lines = [
        "| the model reads | tokens in the context's place | KL to the full context, nats per "
        "answer token | same top token | perplexity of the answer | KL recovered |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, size in sizes.items():
        row = report["conditions"][name]
        lines.append(
            f"| {name} | {size} | {row['kl']:.3f} ± {row['kl_standard_error']:.3f} | "
            f"{row['top1_agreement']:.1%} | {row['perplexity']:.2f} | {row['kl_recovered']:.1%} |"
        )
    return "\n".join(lines)


def distribution_table(example: str = "handbook") -> str:
    """The other figures of the example's evaluation."""
    lines = [
        "| the model reads | median KL | 99 % | 99.9 % | largest | RMS Δp | perplexity ratio | "
        "entropy | calibration error | rank correlation |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = read(f"{example}.json")["conditions"]
    for name in CONDITIONS:
        row = rows[name]
        kl = " | ".join(f"{row[key]:.3f}" for key in ("kl_median", "kl_99", "kl_999", "kl_max"))
        lines.append(
            f"| {name} | {kl} | {row['rms_delta_p']:.1%} | {row['perplexity_ratio']:.2f} | "
            f"{row['entropy']:.2f} | {row['calibration_error']:.1%} | "
            f"{row['rank_correlation']:.2f} |"
        )
    return "\n".join(lines)


def front_table() -> str:
    """For the README: ours, plain PyTorch and the fastest other one."""
    results = read("cpu.json")
    rows = [row for name in DTYPES for row in tables.front_rows(results["losses"], name)]
    line = "Forward and backward, {head}, T tokens, {threads} CPU cores ({cpu})."
    if any(row["bare_converted"] for row in rows):
        line += " PyTorch has only plain loops for bf16 on this CPU."
    return tables.front_table(rows).with_text(
        line.format(head=tables.head(rows[0]), **results["machine"])
    )


def headline() -> str:
    """What the soft prompt keeps of the example, and what its loss costs. In fp32, in which no
    implementation waits for a product that a CPU has no instructions for."""
    report, results = read("handbook.json"), read("cpu.json")
    rows, machine = tables.front_rows(results["losses"], "float32"), results["machine"]
    ours, peer = tables.ours_and_fastest_peer([r for r in rows if r["loss"] == STORED])
    return (
        "softprompt_fast compresses a long context into a few virtual tokens: on a small real "
        f"model, {report['num_virtual_tokens']} of them recover {report['kl_recovered']:.0%} of "
        f"what a handbook of {report['context_tokens']} tokens changes in the predictions, and "
        f"the exact KL loss over a vocabulary of {ours['V']:,} takes "
        f"{ours['milliseconds']:.0f} ms and {ours['peak_mib']:.0f} MiB for {ours['T']} tokens in "
        f"fp32 on {machine['threads']} CPU cores, where the fastest other implementation takes "
        f"{peer['milliseconds']:.0f} ms and {peer['peak_mib']:.0f} MiB."
    )


def all_losses_table() -> str:
    rows = read("cpu.json")["losses"]
    notes = [tables.rounding_line(rows), tables.verdict_line(rows), "Not measured there:"]
    notes.append("\n".join(f"- {text}" for text in tables.missing(rows)))
    return "\n\n".join([tables.loss_table(rows).markdown(), *notes])


def growth_table() -> str:
    return tables.growth_table(read("cpu.json")["growth"]).markdown()


def machine_line() -> str:
    machine = read("cpu.json")["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"torch {machine['torch']}, commit {machine['commit']}."
    )


def bench_line() -> str:
    minutes = read("cpu.json")["seconds"] / 60
    return f"With everything installed it took {minutes:.0f} minutes on the machine named below."


def gpu_tables() -> str:
    """What ``make gpu`` measured, a GPU after the other; nothing where it has not run."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        results = read(path.name)
        if results.get("kind") == "gpu" and results.get("rows"):
            parts += [gpu_results.machine_line(results), gpu_results.loss_table(results["rows"])]
            if results.get("row_kernels"):
                parts.append(gpu_results.kernel_table(results["row_kernels"]))
    return "\n\n".join(parts)


def run_line(example: str = "handbook") -> str:
    run, report = read(f"{example}_run.json"), read(f"{example}.json")
    return (
        f"{report['context_tokens']} context tokens became {report['num_virtual_tokens']} virtual "
        f"tokens in {run['steps']} steps, {run['seconds']:.0f} s on 2 CPU cores; measured on "
        f"{report['queries']} held-out queries, {report['answer_tokens']} answer tokens."
    )


def sweep_table(file: str = "sweep.json") -> str:
    curve = read(file)
    headings, rows = curve_cells(curve)
    without, runs = curve["baselines"]["no context"], curve["rows"]
    return tables.Table("", headings, rows, texts=0).with_text(
        f"No context: {kl_with_error(without)}. The context has {curve['context_tokens']} "
        f"tokens. {len(runs)} runs of {runs[0]['steps']} steps with "
        f"{curve['options'].get('per_device_train_batch_size', 8)} sequences, measured on "
        f"{curve['queries']} held-out queries, {curve['answer_tokens']} answer tokens."
    )


def training_table() -> str:
    """The example's training run against a plain loop, from ``benchmarks/training/run.py``."""
    report = read("training.json")
    lines = [
        "| | seconds a step | before the first step | the whole run |",
        "|---|---:|---:|---:|",
    ]
    rows = {"softprompt_fast": report["softprompt_fast"]}
    again = dict(rows["softprompt_fast"])
    again["preparation_seconds"] = again["preparation_seconds_from_cache"]
    again["whole_seconds"] = again["preparation_seconds"] + again["training_seconds"]
    rows |= {"softprompt_fast, from a teacher cache": again, PLAIN: report[PLAIN]}
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['median_step_seconds']:.2f} | {row['preparation_seconds']:.0f} s | "
            f"{row['whole_seconds']:.0f} s |"
        )
    machine, steps = report["machine"], report["softprompt_fast"]["steps"]
    lines += [
        "",
        f"{steps} steps of 8 sequences, {machine['threads']} cores of an {machine['cpu']}: "
        f"{report['step_ratio']:.1f} times faster a step, {report['whole_ratio']:.1f} times for "
        "the whole run. No step's losses differ by more than "
        f"{report['largest_loss_difference']:.0e} nats.",
    ]
    return "\n".join(lines)


def serving_table() -> str:
    """What a server needs for the first token, from ``benchmarks/serving/run.py``."""
    report = read("serving.json")
    token_kib = report["key_value_bytes_per_token"] / 1024
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in report["rows"]:
        rows.setdefault(row["reads"], {})[row["users"]] = row
    few, many = sorted({row["users"] for row in report["rows"]})
    columns = ["the server reads", "tokens in the context's place", "their keys and values"]
    columns += ["from the cache"]
    for users in (few, many):
        name = "1 user" if users == 1 else f"{users} users"
        columns += [f"{name}: first token", "requests a second"]
    cells = []
    for name, by_users in rows.items():
        is_prompt = name == "soft prompt"
        tokens = report["num_virtual_tokens" if is_prompt else "context_tokens"]
        cached = f"{by_users[few]['cached_tokens']:.0f} tokens"
        cells.append([name, str(tokens), f"{tokens * token_kib / 1024:.1f} MiB", cached])
        for users in (few, many):
            row = by_users[users]
            cells[-1] += [
                f"{1e3 * row['median_seconds']:,.0f} ms ± {row['spread']:.0%}",
                f"{row['requests_per_second']:.2f}",
            ]
    machine, shared = report["machine"], tables.other_work(report["load_before"])
    counts = " and ".join(f"{rows['soft prompt'][users]['requests']}" for users in (few, many))
    return tables.Table("", columns, cells).with_text(
        f"vLLM {report['vllm']}, {report['model']} in fp32, {token_kib:.0f} KiB of keys and "
        f"values a token, {machine['cores']} cores of an {machine['cpu']}. Medians of {counts} "
        "requests of one token each, and how far the quartiles are apart; the three took "
        f"turns.{shared}"
    )


def cache_table() -> str:
    """Bytes per answer token of what may be kept of a teacher, by the sizes of its tensors."""
    lines = [
        "| head | full logits, fp32 | hidden state, bf16 | sketch, k = 128 | sketch, k = 32 | "
        "32 largest, the rest lost |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for model, (D, V) in HEADS.items():
        sizes = (4 * V, 2 * D, sketch_bytes(D, 128), sketch_bytes(D, 32), 8 * 32)
        cells = " | ".join(f"{size:,}" for size in sizes)
        lines.append(f"| {model} ({D} × {V}) | {cells} |")
    report = read("training.json")
    per_token = report["cache_bytes"] / report["answer_tokens"]
    lines += [
        "",
        f"The cache of the example, {report['answer_tokens']:,} answer tokens of SmolLM2-135M in "
        f"fp32, takes {per_token:,.0f} bytes a token on disk, ids and checksums included.",
    ]
    return "\n".join(lines)


def sketch_bytes(D: int, k: int) -> int:
    """ids and probabilities, moment, tail, tail_bias and entropy of a ``TeacherSketch``."""
    return 8 * k + 4 * D + 16


def objectives_table() -> str:
    """Both objectives on both goals, from ``examples/choose_objective.py``."""
    cells = objective_report.rows(read("choose_objective.json"))
    return tables.Table("", list(objective_report.COLUMNS), cells, texts=2).markdown()


def objectives_line() -> str:
    report = read("choose_objective.json")
    teacher = report["teacher"]
    return (
        f'Asked "{report["held_out_queries"][0]}", the model with the notes in place says '
        f"{report['right']} at {teacher['right']:.1%} and {report['wrong']} at "
        f"{teacher['wrong']:.1%}. {report['context_tokens']} tokens of notes become "
        f"{report['num_virtual_tokens']} virtual tokens in {report['steps']} steps of "
        f"{len(report['training_queries'])} other wordings, once with each objective."
    )


TABLES: dict[str, Callable[[], str]] = {
    "faithfulness": faithfulness_table,
    "distribution": distribution_table,
    "headline": headline,
    "front": front_table,
    "bench": bench_line,
    "losses": all_losses_table,
    "growth": growth_table,
    "steps": lambda: tables.step_table(read("cpu.json")["training_steps"]).markdown(),
    "sweep": sweep_table,
    "training": training_table,
    "cache": cache_table,
    "teacher": lambda: long_contexts.teacher_table(read("teacher.json")),
    "prefix_memory": prefix_memory.table,
    "serving": serving_table,
    "gpu": gpu_tables,
    "machine": machine_line,
    "handbook": run_line,
    "long": lambda: run_line("long"),
    "long_faithfulness": lambda: faithfulness_table("long"),
    "long_distribution": lambda: distribution_table("long"),
    "long_sweep": lambda: sweep_table("long_sweep.json"),
    "long_serving": lambda: long_contexts.serving_table(read("long_serving.json")),
    "objectives": objectives_table,
    "objectives_run": objectives_line,
    "objectives_path": lambda: objective_report.path_line(read("choose_objective.json")),
}


def main() -> None:
    for directory in map(Path, sys.argv[1:]):
        is_sweep = (directory / "sweep.json").is_file()
        (keep_sweep if is_sweep else keep_run)(directory)
    for page in PAGES:
        text = page.read_text()
        for name, render in TABLES.items():
            block = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            if block.search(text):
                content = render()
                line = f"{content}\n" if content else ""
                text = block.sub(lambda m, c=line: f"{m[1]}{c}{m[2]}", text)
        page.write_text(text)
    images, report = ROOT / "docs" / "images", read("handbook.json")
    results = read("cpu.json")
    rows = tables.of_dtype(tables.measured(results["losses"]), "float32")
    rows = [row for row in rows if row["loss"] in MAIN]
    pictures.draw(report, rows, results["growth"], images)
    for example, prefix in (("handbook", "evaluation"), ("long", "long")):
        for name, png in plots.pictures(read(f"{example}.json")).items():
            (images / f"{prefix}_{name}.png").write_bytes(png)
    pictures.teacher(read("teacher.json")).savefig(images / "teacher.png", dpi=150)
    picture = objective_report.picture(read("choose_objective.json"))
    picture.savefig(images / "objectives.png", dpi=150)
    for name in ("sweep", "long_sweep"):
        (images / f"{name}.png").write_bytes(curve_picture(read(f"{name}.json")))


if __name__ == "__main__":
    main()
