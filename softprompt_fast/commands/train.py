"""The command ``train``: have the teacher answer the queries, train a soft prompt, save it."""

from __future__ import annotations

import atexit
import hashlib
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from ..arguments import SoftPromptTrainingArguments
from ..base_model.loading import check_dtype, load_model
from ..base_model.output_head import OutputHead
from ..data.records import Record, read_jsonl, read_text
from ..find_lr import find_lr
from ..preflight import check_data, check_options
from ..run_directory import RunDirectory
from ..student.model import SoftPromptModel
from ..student.soft_prompt import SoftPrompt, SoftPromptConfig
from ..teacher.cache import TeacherCache
from ..teacher.examples import check_contexts, count_cut, make_examples
from ..teacher.teacher import Teacher
from ..teacher_store import Store, choose_store
from ..utils.console import progress, say
from ..utils.errors import check_at_least
from . import Command, Invocation
from .training_run import Lessons, train_prompt


@dataclass(kw_only=True)
class TrainOptions:
    """The model and the data of a training run."""

    model: str = field(metadata={"help": "Directory or Hub id of the frozen language model."})
    train_file: str = field(metadata={"help": "JSON Lines file of queries to learn from."})
    context_file: str | None = field(
        default=None,
        metadata={"help": "Text file: the context to replace. A query's own replaces this one."},
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "JSON Lines file of held-out queries."}
    )
    max_new_tokens: int = field(
        default=64, metadata={"help": "Longest answer of the teacher, in tokens."}
    )
    teacher_batch_size: int = field(default=16, metadata={"help": "Queries answered at a time."})
    teacher_store: Store = field(
        default="auto",
        metadata={
            "help": "sketch: all that forward KL needs; hidden: hidden states, for every "
            "divergence; online: nothing, the teacher is asked at each step; auto: sketch where it "
            "is exact, else hidden."
        },
    )
    teacher_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Entries that a sketch keeps of each distribution; by default 32, or 128 for "
            "a head in 16 bits."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Directory where the teacher's work is kept, for later runs too."},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "auto (the checkpoint's own; float32 where the device only emulates it), "
            "float32, bfloat16, float16"
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run Python code that the model's repository brings."}
    )
    shard_base: bool = field(
        default=False,
        metadata={"help": "Each of several processes holds its part of the model's layers."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the earlier run in output_dir and train anew."}
    )
    find_lr: bool = field(
        default=False,
        metadata={"help": "Try learning rates on the data, suggest one, and train nothing."},
    )

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_new_tokens", "teacher_batch_size", "teacher_top_k")
        check_dtype(self.dtype)


# Options that change how a run is watched or where things lie, and not what comes out of it.
FREE_OPTIONS = frozenset(
    [
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_total_limit"),
        *("train_file", "context_file", "eval_file"),  # the first two are compared by content
        *("teacher_cache", "shard_base"),
        *("disable_tqdm", "logging_strategy", "logging_steps", "logging_first_step", "log_level"),
        *("report_to", "run_name", "hub_token", "trust_remote_code", "find_lr"),
    ]
)


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


def train(
    options: TrainOptions,
    config: SoftPromptConfig,
    args: SoftPromptTrainingArguments,
    invocation: Invocation,
) -> int:
    """The exit code. A run is continued only by the options that it began with.

    Raises ValueError or OSError, before the model loads wherever that can be known.
    """
    check_options(options, config, args)
    data = read_data(options)
    check_data(args, len(data.records))
    directory = None
    if not options.find_lr:
        directory = open_directory(options, args, data, invocation.changed)
    if directory is not None and directory.is_finished:
        say(f"{directory.path} holds the soft prompt of this run: nothing is left to train.")
        say("Pass --overwrite_output_dir to train anew.")
        return 0

    if args.world_size > 1:
        atexit.register(_leave_process_group)
    cache = None if options.teacher_cache is None else TeacherCache(options.teacher_cache)
    args.disable_tqdm = args.disable_tqdm or args.process_index != 0
    model, tokenizer = load(options, args)
    prompt = SoftPrompt.from_model(model, tokenizer, config, data.first_context)
    lessons = teach(model, tokenizer, options, args, data, cache)
    student = SoftPromptModel(model, prompt)
    if directory is None:
        find_lr(student, args, lessons.train_set, lessons.asked)
        return 0
    anew = options.overwrite_output_dir
    return train_prompt(student, lessons, args, directory, invocation.stop, anew=anew)


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


def open_directory(
    options: TrainOptions, args: SoftPromptTrainingArguments, data: Data, changed: dict[str, Any]
) -> RunDirectory:
    """The output directory of a run whose user gave the options ``changed``."""
    inputs = run_inputs(options)
    decisive = {name: value for name, value in changed.items() if name not in FREE_OPTIONS}
    decisive["model"] = inputs["model"]
    for name in ("train_file", "context_file"):
        if data.digests[name] is not None:
            decisive[f"{name}_sha256"] = data.digests[name]
    if args.world_size > 1:
        # They share out a batch, or each reads one: a run goes on with as many as it began with.
        decisive["num_processes"] = args.world_size
    with args.main_process_first(local=False):
        return RunDirectory(
            args.output_dir or "",
            decisive,
            inputs=inputs,
            overwrite=options.overwrite_output_dir,
            owner=args.process_index == 0,
        )


def load(options: TrainOptions, args: SoftPromptTrainingArguments) -> tuple[PreTrainedModel, Any]:
    """The frozen model and its tokenizer."""
    set_seed(args.seed)
    model, tokenizer = load_model(
        options.model,
        dtype=options.dtype,
        device=args.device,
        trust_remote_code=options.trust_remote_code,
        shard=options.shard_base and args.world_size > 1,
    )
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
        show_progress=not args.disable_tqdm,
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
        name: getattr(options, name) for name in ("model", "dtype", "max_new_tokens")
    }
    model = os.path.expanduser(options.model)
    if os.path.isdir(model):
        inputs["model"] = os.path.abspath(model)
    for name in ("train_file", "context_file", "eval_file"):
        path = getattr(options, name)
        inputs[name] = None if path is None else os.path.abspath(path)
    return inputs


COMMAND = Command(
    description="Learn a soft prompt that replaces a context.",
    options=(TrainOptions, SoftPromptConfig, SoftPromptTrainingArguments),
    run=train,
)
