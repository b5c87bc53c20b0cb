"""What a run needs before its first step: data, directory, model, and the teacher's work."""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, set_seed

from ..base_model.loading import load_model
from ..base_model.output_head import OutputHead
from ..data.chat_template import DATE, KWARGS, today
from ..data.queries import tokenize_query
from ..data.records import Record, read_jsonl, read_text
from ..student.model import SoftPromptModel
from ..student.soft_prompt import SoftPrompt, SoftPromptConfig
from ..teacher.cache import TeacherCache
from ..teacher.examples import TrainingExample, check_contexts, count_cut, make_examples
from ..teacher.teacher import Teacher
from ..utils.console import progress
from .arguments import FREE_OPTIONS, SoftPromptTrainingArguments, TrainOptions
from .run_directory import RunDirectory
from .teacher_store import choose_store


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the files of a run hold."""

    records: list[Record]
    eval_records: list[Record]
    context: str | None
    digests: dict[str, str | None]
    """SHA-256 by the name of the option, so that files may move. None: there is no such file."""

    @property
    def first_context(self) -> str | None:
        return self.context or self.records[0].context


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What the teacher made of the data, for any number of prompts."""

    train_set: list[TrainingExample]
    eval_set: list[TrainingExample] | None
    teacher: Teacher
    is_online: bool
    """Whether the teacher is asked again at every step."""

    cut_answers: int
    """How many of the answers it wrote reached its max_new_tokens."""

    @property
    def asked(self) -> Teacher | None:
        return self.teacher if self.is_online else None


def read_data(options: TrainOptions) -> Data:
    digests = {name: hashlib.sha256() for name in ("train_file", "context_file", "eval_file")}
    context = None
    if options.context_file is not None:
        context = read_text(options.context_file, digests["context_file"])
    records = read_jsonl(options.train_file, digests["train_file"])
    eval_records = []
    if options.eval_file is not None:
        eval_records = read_jsonl(options.eval_file, digests["eval_file"])
    check_contexts([*records, *eval_records], context)
    return Data(
        records=records,
        eval_records=eval_records,
        context=context,
        digests={
            name: None if getattr(options, name) is None else digest.hexdigest()
            for name, digest in digests.items()
        },
    )


@contextmanager
def owned_directory(
    options: TrainOptions, args: SoftPromptTrainingArguments, data: Data, changed: dict[str, Any]
) -> Iterator[RunDirectory]:
    """The output directory of a run whose user gave the options ``changed``.

    Raises OSError if it cannot be written to, and ValueError if it is in use, holds something
    else, or a run with other options.
    """
    inputs = run_inputs(options)
    decisive = {name: value for name, value in changed.items() if name not in FREE_OPTIONS}
    decisive["model"] = inputs["model"]
    if options.chat_template_kwargs:  # however the JSON was written
        decisive[KWARGS] = options.chat_template_kwargs
    for name in ("train_file", "context_file"):
        if data.digests[name] is not None:
            decisive[f"{name}_sha256"] = data.digests[name]
    if args.world_size > 1:
        # They share out a batch, or each reads one: a run goes on with as many as it began with.
        decisive["num_processes"] = args.world_size
    with ExitStack() as stack:
        with args.main_process_first(local=False):
            directory = RunDirectory(
                args.output_dir or "",
                decisive,
                inputs=inputs,
                overwrite=options.overwrite_output_dir,
                is_owner=args.process_index == 0,
            )
            stack.enter_context(directory.owned())
        yield directory


def prepare(
    options: TrainOptions,
    config: SoftPromptConfig,
    args: SoftPromptTrainingArguments,
    data: Data,
    checkpoint: Path | None = None,
) -> tuple[SoftPromptModel, Lessons]:
    """The model with a new soft prompt, and what it is to learn.

    checkpoint: from which the run will go on. Raises ValueError before the teacher's work if its
    prompt was begun with another model or chat template.
    """
    if args.world_size > 1:
        atexit.register(_leave_process_group)
    cache = None if options.teacher_cache is None else TeacherCache(options.teacher_cache)
    begun = [] if checkpoint is None else [SoftPrompt.from_pretrained(checkpoint)]
    model, tokenizer = load(options, args, begun, cache)
    prompt = SoftPrompt.from_model(model, tokenizer, config, data.first_context)
    student = SoftPromptModel(model, prompt)
    check_queries(student, tokenizer, data)
    return student, teach(model, tokenizer, options, args, data, cache)


def check_queries(student: SoftPromptModel, tokenizer: Any, data: Data) -> None:
    """Raises ValueError naming a query that the student cannot read: before the teacher's work,
    which may take hours."""
    for record in (*data.records, *data.eval_records):
        query = tokenize_query(tokenizer, record.messages, "", source=record.source)
        student.check_length(query, answer_tokens=1)


def load(
    options: TrainOptions,
    args: SoftPromptTrainingArguments,
    begun: Sequence[SoftPrompt],
    cache: TeacherCache | None,
) -> tuple[PreTrainedModel, Any]:
    """The frozen model and its tokenizer, whose chat template prints the date that it printed for
    the prompts that are ``begun``, or for what is in the ``cache``.

    Raises ValueError if the prompts were begun with another model or chat template.
    """
    recorded = [prompt.template for prompt in begun] + [cache.read_facts() if cache else {}]
    dates = [facts[DATE] for facts in recorded if DATE in facts]
    # As the first process has it: at midnight, others may have another day.
    (date,) = broadcast_object_list([dates[0] if dates else today()])
    set_seed(args.seed)
    model, tokenizer = load_model(
        options.model,
        dtype=options.dtype,
        device=args.device,
        trust_remote_code=options.trust_remote_code,
        shard=options.shard_base and args.world_size > 1,
        chat_template_kwargs=options.chat_template_kwargs,
        chat_template_date=date,
    )
    for prompt in begun:
        prompt.check_base(model)
        prompt.check_tokenizer(tokenizer)
    progress(f"The model computes in {str(model.dtype).removeprefix('torch.')} on {model.device}")
    return model, tokenizer


def teach(
    model: PreTrainedModel,
    tokenizer: Any,
    options: TrainOptions,
    args: SoftPromptTrainingArguments,
    data: Data,
    cache: TeacherCache | None,
) -> Lessons:
    """Has the teacher answer, and keeps of it what the objective of ``args`` needs."""
    teacher = Teacher(
        model,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.teacher_batch_size,
        max_context_tokens=options.max_context_tokens,
        show_progress=not args.disable_tqdm,
        **options.of_prefix(),
    )
    head = OutputHead.from_model(model)
    store = choose_store(options.teacher_store, args, top_k=options.teacher_top_k, head=head)
    progress(str(store))
    evaluates = args.eval_strategy != "no" and data.eval_records
    train_set, *eval_sets = [
        make_examples(
            teacher, tokenizer, part, data.context, cache=cache, together=True, **store.record
        )
        for part in ([data.records, data.eval_records] if evaluates else [data.records])
    ]
    return Lessons(
        train_set=train_set,
        eval_set=eval_sets[0] if eval_sets else None,
        teacher=teacher,
        is_online=store.kind == "online",
        cut_answers=count_cut(data.records, train_set, teacher),
    )


def _leave_process_group() -> None:
    """Without it, processes that end one after another may abort each other."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_inputs(options: TrainOptions) -> dict[str, Any]:
    """Where the model and the data are, by absolute path, and how the model is used."""
    inputs: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("model", "dtype", "max_new_tokens", "max_context_tokens")
    }
    model = os.path.expanduser(options.model)
    if os.path.isdir(model):
        inputs["model"] = os.path.abspath(model)
    for name in ("train_file", "context_file", "eval_file"):
        path = getattr(options, name)
        inputs[name] = None if path is None else os.path.abspath(path)
    return inputs
