"""The commands that use a saved soft prompt: ``eval`` and ``generate``."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from .bounds import check_at_least
from .console import progress, say
from .data import read_jsonl, read_text
from .evaluate import evaluate
from .examples import check_contexts
from .files import write_json
from .generate import generate
from .model import SoftPromptModel
from .pretrained import check_dtype, load_model
from .prompting import tokenize_query
from .report import side_by_side, table
from .run_directory import EVALUATION_FILE, read_run
from .soft_prompt import SoftPrompt


@dataclass(kw_only=True)
class PromptOptions:
    """A saved soft prompt and the model that it was trained for."""

    prompt_dir: str = field(metadata={"help": "Directory of the soft prompt: train's output_dir."})
    model: str | None = field(
        default=None, metadata={"help": "Directory or Hub id; default: the model of the training."}
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer, in tokens; default: as in training."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "auto (the checkpoint's own), float32, bfloat16, float16; default: as in "
            "training."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository brings."}
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_new_tokens")
        if self.dtype is not None:
            check_dtype(self.dtype)


@dataclass(kw_only=True)
class EvalOptions(PromptOptions):
    eval_file: str | None = field(
        default=None, metadata={"help": "JSON Lines file of held-out queries; default: the run's."}
    )
    context_file: str | None = field(
        default=None, metadata={"help": "Text file of the full context; default: the run's."}
    )
    batch_size: int = field(default=16, metadata={"help": "Queries read at a time."})
    workspace_mib: float = field(default=256, metadata={"help": "Memory for logits, in MiB."})
    num_samples: int = field(default=4, metadata={"help": "Queries whose answers are shown."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "batch_size", "workspace_mib")
        check_at_least(self, 0, "num_samples")


def evaluate_prompt(options: EvalOptions) -> int:
    """Writes evaluation.json into the prompt's directory and prints it as tables."""
    run = read_run(options.prompt_dir)
    inputs = _inputs(options, run)
    if inputs["eval_file"] is None:
        raise ValueError(
            f"{options.prompt_dir} names no held-out queries: pass --eval_file, a JSON Lines file "
            "of queries that the prompt was not trained on"
        )
    records = read_jsonl(inputs["eval_file"])
    context, is_context_of_training = _context(options, run, inputs["context_file"])
    check_contexts(records, context)
    model, tokenizer, prompt = _load(options, inputs)
    report = evaluate(
        model,
        tokenizer,
        prompt,
        records,
        context,
        max_new_tokens=inputs["max_new_tokens"],
        batch_size=options.batch_size,
        num_samples=options.num_samples,
        workspace_mib=options.workspace_mib,
    )
    report["objective"] = run.get("objective")
    report["eval_file"] = str(inputs["eval_file"])
    report["context_of_training"] = is_context_of_training
    console = Console()
    if report["answers"]:
        console.print(side_by_side(report))
    console.print(table(report))
    # After the tables: what took long to measure is on the screen if it cannot be written.
    file = Path(options.prompt_dir) / EVALUATION_FILE
    write_json(file, report)
    say(f"Written to {file}")
    return 0


def answer_question(options: PromptOptions, question: str | None) -> int:
    """Prints the answer to ``question``, or to what stdin holds."""
    if question is None:
        try:
            question = sys.stdin.read()
            question.encode()  # what Python could not decode may be here as half a surrogate pair
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            raise ValueError(f"the question is not UTF-8: see character {error.start}") from None
    if not question.strip():
        raise ValueError("the question is empty")
    inputs = _inputs(options, read_run(options.prompt_dir))
    model, tokenizer, prompt = _load(options, inputs)
    query = tokenize_query(tokenizer, [{"role": "user", "content": question.strip()}], "")
    answers = generate(
        SoftPromptModel(model, prompt),
        tokenizer,
        [query],
        max_new_tokens=inputs["max_new_tokens"],
        show_progress=False,
    )
    say(answers[0])
    return 0


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


def _inputs(options: PromptOptions, run: dict[str, Any]) -> dict[str, Any]:
    """What the user gave, else what the training run recorded, else nothing."""
    recorded = run.get("inputs", {})
    names = ("model", "dtype", "max_new_tokens", "eval_file", "context_file")
    inputs = {name: getattr(options, name, None) for name in names}
    inputs = {n: recorded.get(n) if value is None else value for n, value in inputs.items()}
    inputs["max_new_tokens"] = 64 if inputs["max_new_tokens"] is None else inputs["max_new_tokens"]
    return inputs


def _load(options: PromptOptions, inputs: dict[str, Any]) -> tuple[Any, Any, SoftPrompt]:
    """Model, tokenizer and prompt; whether the prompt is there is known before the model loads."""
    prompt = SoftPrompt.from_pretrained(options.prompt_dir)
    name = inputs["model"] or prompt.base["name_or_path"]
    # The recorded choice to trust remote code is not taken over: a prompt may come from elsewhere.
    model, tokenizer = load_model(
        name, dtype=inputs["dtype"] or "auto", trust_remote_code=options.trust_remote_code
    )
    prompt.check_base(model)
    return model, tokenizer, prompt
