"""The example's training run, by this package and by a plain loop around PEFT and F.kl_div.

The plain loop is what one writes without this package: ``transformers.Trainer`` over a PEFT
prompt-tuning model, the teacher reading the full context in every step, logits of both in memory.
Same model, answers, batches, optimiser and first soft prompt; the losses of the steps are compared.

    python benchmarks/training/run.py MODEL_DIR [--steps N]     # default: every step of the example

Writes benchmarks/results/training.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.nn.functional as F
from conftest import machine
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from softprompt_fast import SoftPrompt, SoftPromptConfig, SoftPromptTrainer
from softprompt_fast.base_model.loading import load_model
from softprompt_fast.data.queries import teacher_ids
from softprompt_fast.data.records import read_jsonl
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.teacher.answers import SketchOptions
from softprompt_fast.teacher.cache import TeacherCache
from softprompt_fast.teacher.examples import TrainingExample, make_examples
from softprompt_fast.teacher.teacher import Teacher
from softprompt_fast.training.arguments import SoftPromptTrainingArguments

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "training.json"
# As in examples/handbook.yaml, but for the placement, which is PEFT's.
P = 32
PROMPT = SoftPromptConfig(num_virtual_tokens=P, placement="prefix")
RECIPE: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "learning_rate": 0.02,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "seed": 0,
}


class Clock(TrainerCallback):
    """Seconds of every optimisation step, the loading of its batch included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class PlainTrainer(Trainer):
    """KL(teacher || student) from full logits; the teacher reads the context in every step."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        with torch.no_grad(), model.disable_adapter():
            teacher = model(
                input_ids=inputs["teacher_ids"], attention_mask=inputs["teacher_mask"]
            ).logits
        student = model(input_ids=inputs["ids"], attention_mask=inputs["mask"]).logits[:, P:]
        log_p = teacher[inputs["teacher_answer"]].log_softmax(-1)
        log_q = student[inputs["answer"]].log_softmax(-1)
        return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def plain_batch(examples: Sequence[TrainingExample]) -> dict[str, Tensor]:
    """Padded on the right, with masks of the positions that predict the answers."""
    batch = {}
    for name, query_of in (("", lambda query: query.plain), ("teacher_", teacher_ids)):
        queries = [query_of(example.query) for example in examples]
        answers = [example.answer.ids for example in examples]
        rows = [q + a[:-1] for q, a in zip(queries, answers, strict=True)]
        length = max(map(len, rows))
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        mask, predicts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (query, tokens) in enumerate(zip(queries, rows, strict=True)):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            predicts[row, len(query) - 1 : len(tokens)] = True
        batch |= {f"{name}ids": ids, f"{name}mask": mask, f"{name}answer": predicts}
    return batch


def run(trainer: Trainer) -> dict[str, Any]:
    clock = Clock()
    trainer.add_callback(clock)
    start = time.perf_counter()
    trainer.train()
    return {
        "steps": len(clock.seconds),
        "training_seconds": time.perf_counter() - start,
        "median_step_seconds": median(clock.seconds),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def train_plain(
    model: Any, examples: list[TrainingExample], prompt: Tensor, steps: int, directory: str
) -> tuple[dict[str, Any], Tensor]:
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=P)
    student = get_peft_model(model, config)
    embedding = student.prompt_encoder["default"].embedding
    with torch.no_grad():
        embedding.weight.copy_(prompt)
    args = TrainingArguments(directory, max_steps=steps, **RECIPE)
    trainer = PlainTrainer(
        model=student, args=args, train_dataset=examples, data_collator=plain_batch
    )
    return run(trainer), embedding.weight.detach()


def train_fast(
    model: Any, examples: list[TrainingExample], prompt: SoftPrompt, steps: int, directory: str
) -> tuple[dict[str, Any], Tensor]:
    args = SoftPromptTrainingArguments(directory, max_steps=steps, **RECIPE)
    student = SoftPromptModel(model, prompt)
    return run(SoftPromptTrainer(student, args, examples)), prompt.embedding.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of the model, as made by make demo")
    parser.add_argument("--steps", type=int, default=-1, help="default: every step of the example")
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, device="cpu")
    context = (ROOT / "examples" / "handbook.md").read_text()
    records = read_jsonl(ROOT / "examples" / "handbook_train.jsonl")
    prompt = SoftPrompt.from_model(model, tokenizer, PROMPT, context)
    first = prompt.embedding.detach().clone()
    teacher = Teacher(model, tokenizer, max_new_tokens=32, batch_size=16, show_progress=False)

    def prepare(**form: Any) -> tuple[list[TrainingExample], float]:
        start = time.perf_counter()
        made = make_examples(teacher, tokenizer, records, context, record_hidden=False, **form)
        return made, time.perf_counter() - start

    with tempfile.TemporaryDirectory() as directory:
        print("The teacher answers ...", flush=True)
        _, answer_seconds = prepare()
        print("The teacher answers and is sketched ...", flush=True)
        form = {"sketch": SketchOptions(), "cache": TeacherCache(Path(directory) / "cache")}
        _, first_seconds = prepare(**form)
        examples, cached_seconds = prepare(**form)
        cache_bytes = sum(path.stat().st_size for path in form["cache"].path.glob("shard-*"))
        print("softprompt_fast ...", flush=True)
        fast, ours = train_fast(model, examples, prompt, options.steps, directory)
        print("Trainer, PEFT, F.kl_div ...", flush=True)
        plain, theirs = train_plain(model, examples, first, options.steps, directory)
    fast["preparation_seconds"], plain["preparation_seconds"] = first_seconds, answer_seconds
    fast["preparation_seconds_from_cache"] = cached_seconds
    for result in (fast, plain):
        result["whole_seconds"] = result["preparation_seconds"] + result["training_seconds"]
    losses = zip(fast["losses"], plain["losses"], strict=True)
    report = {
        "machine": machine(),
        "model": Path(options.model).name,
        "answer_tokens": sum(len(example.answer.ids) for example in examples),
        "cache_bytes": cache_bytes,
        "softprompt_fast": fast,
        "Trainer, PEFT, F.kl_div": plain,
        "step_ratio": plain["median_step_seconds"] / fast["median_step_seconds"],
        "whole_ratio": plain["whole_seconds"] / fast["whole_seconds"],
        "largest_loss_difference": max(abs(a - b) for a, b in losses),
        "prompt_distance": float((ours - theirs).norm() / (ours - first).norm()),
    }
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    shown = {k: v for k, v in report.items() if not isinstance(v, dict)}
    print(json.dumps(shown, indent=1))
    for name in ("softprompt_fast", "Trainer, PEFT, F.kl_div"):
        row = report[name]
        print(
            f"{name}: {row['median_step_seconds']:.2f} s a step, {row['whole_seconds']:.0f} s for "
            f"{row['steps']} steps, {row['preparation_seconds']:.0f} s of it before the first"
        )


if __name__ == "__main__":
    main()
