"""Which objective? Notes that disagree, two goals, and what KL and NLL make of each.

    python examples/choose_objective.py --output runs/choose_objective

Two of three notes name Wednesday, one names Thursday. With the notes in place the model answers
Wednesday at nearly 60 % and Thursday at nearly 30 %. Two people want two things of a soft prompt:

1. A team compresses the notes. The model shall stay as unsure as it is, and rank the wrong answers
   as it does.
2. A researcher wants the right answer above 95 %, whatever happens to the others.

Both objectives learn from the same queries and the teacher's same answers, up to the day. All
figures are of a wording that neither has read.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import objective_report
from objective_measures import Judge, Watch
from rich.console import Console
from transformers import PrinterCallback

import softprompt_fast as spf
from softprompt_fast.base_model.loading import load_model
from softprompt_fast.data.records import Record
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.teacher.examples import TrainingExample, make_examples
from softprompt_fast.teacher.teacher import Teacher
from softprompt_fast.utils.console import complain, progress, say
from softprompt_fast.utils.errors import check_at_least
from softprompt_fast.utils.files import make_writable, write_json

MODEL = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-instruct"
NOTES = """Notes on the village.
- The market is held on Wednesday.
- The market is held on Wednesday.
- The market is held on Thursday."""
RIGHT, WRONG = " Wednesday", " Thursday"
TRAINING = (
    "On which day is the market held?",
    "Tell me the day of the market.",
    "Which day is the market held on?",
)
HELD_OUT = ("What day is the market held?",)
ANSWER_TOKENS = 6  # "The market is held on", and the day


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains both prompts, prints the table, and returns what ``choose_objective.json`` holds.

    Raises OSError or ValueError if the model cannot be loaded or does not answer as told above, or
    if the output directory cannot be written to.
    """
    options = read_options(argv)
    started = time.perf_counter()
    if options.output is not None:
        make_writable("--output", options.output)
    base, tokenizer = load_model(options.model, device="cpu")
    teacher = Teacher(base, tokenizer, max_new_tokens=ANSWER_TOKENS, show_progress=False)
    training, held_out = (
        make_examples(teacher, tokenizer, records(queries), NOTES, record_hidden=True)
        for queries in (TRAINING, HELD_OUT)
    )
    right, wrong = days(tokenizer, held_out)
    report: dict[str, Any] = {
        "model": Path(options.model).name,
        "context_tokens": len(held_out[0].query.context),
        "num_virtual_tokens": options.num_virtual_tokens,
        "steps": options.steps,
        "training_queries": TRAINING,
        "held_out_queries": HELD_OUT,
        "right": RIGHT.strip(),
        "wrong": WRONG.strip(),
    }
    for objective in ("kl", "nll"):
        config = spf.SoftPromptConfig(num_virtual_tokens=options.num_virtual_tokens)
        prompt = spf.SoftPrompt.from_model(base, tokenizer, config, NOTES)
        student = SoftPromptModel(base, prompt)
        judge = Judge(student, held_out, right=right, wrong=wrong)
        watch = Watch(judge, every=max(1, options.steps // 5))
        progress(f"Training with {objective}: {options.steps} steps")
        train(student, objective, training, watch, options)
        report["teacher"] = judge.figures(judge.log_p)
        report[objective] = judge.figures(judge.log_q()) | {"path": watch.path}
    Console().print(objective_report.table(report))
    say(objective_report.path_line(report))
    say(f"Took {time.perf_counter() - started:.0f} s.")
    if options.output is not None:
        write(report, options.output)
    return report


def records(queries: Sequence[str]) -> list[Record]:
    """Queries whose answer the teacher gives, from the notes."""
    return [
        Record(
            messages=[{"role": "user", "content": query}],
            completion=None,
            context=None,
            source=f"the query {query!r}",
        )
        for query in queries
    ]


def train(
    student: SoftPromptModel,
    objective: str,
    examples: Sequence[TrainingExample],
    watch: Watch,
    options: argparse.Namespace,
) -> None:
    """Each step reads all queries."""
    with tempfile.TemporaryDirectory() as nothing_is_saved:
        args = spf.SoftPromptTrainingArguments(
            output_dir=nothing_is_saved,
            objective=objective,
            max_steps=options.steps,
            per_device_train_batch_size=len(examples),
            learning_rate=0.05,
            seed=options.seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = spf.SoftPromptTrainer(student, args, train_dataset=examples, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def days(tokenizer: Any, examples: Sequence[TrainingExample]) -> tuple[int, int]:
    """The tokens of the two days. Raises ValueError if an answer does not name the right one."""
    right, wrong = (tokenizer(day, add_special_tokens=False)["input_ids"] for day in (RIGHT, WRONG))
    for example in examples:
        if not len(right) == len(wrong) == 1 or right[0] not in example.answer.ids:
            raise ValueError(
                f"--model must name a day in one token, and answer {example.query.source} with"
                f"{RIGHT}: got {tokenizer.decode(example.answer.ids)!r}. The notes are made for "
                "SmolLM2-135M-Instruct."
            )
    return right[0], wrong[0]


def write(report: dict[str, Any], directory: Path) -> None:
    write_json(directory / "choose_objective.json", report)
    say(f"The figures are in {directory / 'choose_objective.json'}")
    if find_spec("matplotlib") is None:
        say("matplotlib is not installed: no picture.")
        return
    objective_report.picture(report).savefig(directory / "choose_objective.png", dpi=150)
    say(f"The picture is {directory / 'choose_objective.png'}")


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Which objective? KL and NLL on two goals.")
    parser.add_argument("--model", default=str(MODEL), help="directory of SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, help="directory for the figures and the picture")
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--num_virtual_tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the order within a step")
    options = parser.parse_args(argv)
    check_at_least(options, 1, "steps", "num_virtual_tokens")
    check_at_least(options, 0, "seed")
    return options


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        complain(str(error))
        sys.exit(1)
