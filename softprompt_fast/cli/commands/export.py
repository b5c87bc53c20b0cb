"""The command ``export``: a soft prompt in the form that another program reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...base_model.checks import check_reads_embeds
from ...data.records import Record, read_jsonl
from ...export.peft import export_peft
from ...export.safetensors import export_safetensors
from ...export.vllm import export_vllm
from ...student.model import SoftPromptModel
from ...student.soft_prompt import SoftPrompt
from ...training.run_directory import read_run
from ...utils.console import say
from ...utils.errors import OptionError
from ...utils.files import new_directory, write_bytes
from ..command import Argument, Command, Invocation
from ..saved_prompt import PromptOptions, load_prompt, recorded_inputs

README_FILE = "README.md"
SHOWN_FILES = 4


@dataclass(kw_only=True)
class ExportOptions(PromptOptions):
    to: Literal["peft", "vllm", "safetensors"] = field(
        metadata={"help": "The reader: a PEFT adapter, requests to vLLM, or one plain file."}
    )
    output_dir: str = field(metadata={"help": "A new directory. Nothing is ever replaced."})
    query_file: str | None = field(
        default=None, metadata={"help": "For vllm: JSON Lines file of queries to make requests of."}
    )


def export_prompt(options: ExportOptions, invocation: Invocation) -> int:
    """Writes all of ``output_dir`` or nothing, and prints the lines that read it."""
    inputs = recorded_inputs(options, read_run(options.prompt_dir))
    records = _records(options, invocation.argument)
    with new_directory("output_dir", options.output_dir) as directory:
        readme = _export(options, inputs, records, directory)
        write_bytes(directory / README_FILE, readme.encode())
        names = sorted(path.name for path in directory.iterdir())
    more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    say(f"Written to {options.output_dir}: {', '.join(names[:SHOWN_FILES])}{more}")
    _, *lines = readme.splitlines()  # the title
    say("\n".join(line for line in lines if not line.startswith("```")))
    return 0


def _records(options: ExportOptions, question: str | None) -> list[Record]:
    """The queries to make requests of; raises OptionError where they make no sense."""
    if options.to != "vllm" and (question is not None or options.query_file is not None):
        raise OptionError(f"queries go with --to vllm only: {options.to} is for any query")
    if question is not None and options.query_file is not None:
        raise OptionError("give a question or --query_file, not both")
    if options.query_file is not None:
        return read_jsonl(options.query_file)
    if question is None:
        return []
    if not question.strip():
        raise ValueError("the question is empty")
    messages = [{"role": "user", "content": question.strip()}]
    return [Record(messages=messages, completion=None, context=None, source="the question")]


def _export(
    options: ExportOptions, inputs: dict[str, Any], records: list[Record], directory: Path
) -> str:
    """The text of the README."""
    if options.to == "safetensors":  # the only one that takes no model
        prompt = SoftPrompt.from_pretrained(options.prompt_dir)
        base = inputs["model"] or prompt.base["name_or_path"]
        return export_safetensors(prompt, directory, at=options.output_dir, base=base)
    base_model, tokenizer, prompt = load_prompt(options, inputs)
    model = SoftPromptModel(base_model, prompt)
    facts: dict[str, Any] = {
        "at": options.output_dir,
        "base": inputs["model"] or prompt.base["name_or_path"],
        "max_new_tokens": inputs["max_new_tokens"],
    }
    check_reads_embeds(base_model)
    if options.to == "peft":
        return export_peft(model, tokenizer, directory, **facts)
    return export_vllm(model, tokenizer, records, directory, **facts)


COMMAND = Command(
    description="Hand a soft prompt on: to PEFT, to vLLM, or as plain safetensors.",
    options=(ExportOptions,),
    run=export_prompt,
    argument=Argument(name="question", help="for vllm: the question to make a request of"),
)
