"""The command ``eval``: compare a soft prompt with the context that it replaces."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ...data.records import read_jsonl, read_text
from ...evaluation.evaluate import evaluate
from ...evaluation.report.page import page
from ...evaluation.report.plots import pictures
from ...evaluation.report.tables import side_by_side, table
from ...teacher.examples import check_contexts
from ...teacher.options import PrefixOptions
from ...teacher.teacher import LEAST_CONTEXT
from ...training.run_directory import EVALUATION_FILE, facts_of_run, read_run
from ...utils.console import progress, say
from ...utils.errors import check_at_least
from ...utils.files import write_bytes, write_json
from ..command import Command, Invocation
from ..saved_prompt import PromptOptions, load_prompt, recorded_inputs


@dataclass(kw_only=True)
class EvalOptions(PromptOptions, PrefixOptions):
    eval_file: str | None = field(
        default=None, metadata={"help": "JSON Lines file of held-out queries; default: the run's."}
    )
    context_file: str | None = field(
        default=None, metadata={"help": "Text file of the full context; default: the run's."}
    )
    max_context_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Of a longer context the teacher reads an excerpt with each query; default: as "
            "in training."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Queries read at a time."})
    workspace_mib: float = field(default=256, metadata={"help": "Memory for logits, in MiB."})
    num_samples: int = field(default=4, metadata={"help": "Queries whose answers are shown."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "batch_size", "workspace_mib")
        check_at_least(self, LEAST_CONTEXT, "max_context_tokens")
        check_at_least(self, 0, "num_samples")


def evaluate_prompt(options: EvalOptions, invocation: Invocation) -> int:
    """Writes the report into the prompt's directory, as JSON, page and pictures, and prints it."""
    run = read_run(options.prompt_dir)
    inputs = recorded_inputs(options, run)
    if inputs["eval_file"] is None:
        raise ValueError(
            f"{options.prompt_dir} names no held-out queries: pass --eval_file, a JSON Lines file "
            "of queries that the prompt was not trained on"
        )
    digest = hashlib.sha256()
    records = read_jsonl(inputs["eval_file"], digest)
    context, is_context_of_training = _context(options, run, inputs["context_file"])
    check_contexts(records, context)
    facts = facts_of_run(options.prompt_dir, inputs["eval_file"])
    model, tokenizer, prompt = load_prompt(options, inputs)
    report = evaluate(
        model,
        tokenizer,
        prompt,
        records,
        context,
        max_new_tokens=inputs["max_new_tokens"],
        max_context_tokens=inputs["max_context_tokens"],
        batch_size=options.batch_size,
        num_samples=options.num_samples,
        workspace_mib=options.workspace_mib,
        **options.of_prefix(),
    )
    report |= facts
    report["eval_file_sha256"] = digest.hexdigest()
    report["context_of_training"] = is_context_of_training
    file = Path(options.prompt_dir) / EVALUATION_FILE
    try:
        # before the tables, since nobody may read those to their end: eval | head -1
        _write(report, file)
    finally:
        # also where it cannot be written, since it took long to measure
        console = Console()
        if report["answers"]:
            console.print(side_by_side(report))
        console.print(table(report))
    say(f"Written to {file}, with pictures; look at {file.with_suffix('.html')}")
    return 0


def _write(report: dict[str, Any], file: Path) -> None:
    write_json(file, report)
    drawn = pictures(report)
    for name, png in drawn.items():
        write_bytes(file.with_name(f"{file.stem}_{name}.png"), png)
    write_bytes(file.with_suffix(".html"), page(report, drawn).encode())


def _context(
    options: EvalOptions, run: dict[str, Any], path: str | None
) -> tuple[str | None, bool | None]:
    """The context, and whether it is that of the training, None if that is not known.

    Raises ValueError if it has changed since, unless it was asked for by name.
    """
    if path is None:
        return None, None
    digest = hashlib.sha256()
    context = read_text(path, digest)
    trained_on = run.get("options", {}).get("context_file_sha256")
    same = None if trained_on is None else digest.hexdigest() == trained_on
    if same is False:
        problem = f"{path} is not the context that the prompt was trained on"
        if options.context_file is None:
            raise ValueError(
                f"{problem}: it has changed since. Restore it, or pass --context_file={path} to "
                "compare with what it holds now."
            )
        progress(f"Note: {problem}")
    return context, same


COMMAND = Command(
    description="Compare a soft prompt with the context it replaces.",
    options=(EvalOptions,),
    run=evaluate_prompt,
)
