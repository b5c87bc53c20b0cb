"""The command ``sweep``: train for several lengths and objectives, and measure what comes of it.

One model, one teacher and one evaluation serve all runs; each run is what ``train`` makes of the
same flags, in a directory of its own:

kl_P16/ ...      a run, with evaluation.json
teacher_cache/   the teacher's work, unless it is kept elsewhere
sweep.json       the compression curve, as far as it is known
sweep.png        the same as a picture, at the end
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..arguments import SoftPromptTrainingArguments
from ..conditions import SOFT
from ..console import progress, say
from ..errors import UsageError
from ..evaluate import Evaluation
from ..files import leftovers, locked, make_writable, write_bytes, write_json
from ..model import SoftPromptModel
from ..preflight import check_data, check_options
from ..report.curve import curve_picture
from ..report.tables import curve_table, kl_with_error
from ..run_directory import EVALUATION_FILE, RunDirectory
from ..soft_prompt import SoftPrompt, SoftPromptConfig
from ..sweep import SWEPT, compression_curve, is_measured
from ..teacher_cache import TeacherCache
from . import Command, Invocation
from .eval import add_facts
from .train import (
    Data,
    Lessons,
    TrainOptions,
    load,
    open_directory,
    read_data,
    teach,
    train_prompt,
)

CURVE_FILE, PICTURE_FILE = "sweep.json", "sweep.png"
CACHE_DIRECTORY = "teacher_cache"
LOCK_FILE = ".sweep.lock"
RUN_NAME = re.compile(r".+_P\d+")


@dataclass(kw_only=True, eq=False)
class Run:
    """What ``train`` would get, and where it is."""

    options: TrainOptions
    config: SoftPromptConfig
    args: SoftPromptTrainingArguments
    directory: RunDirectory
    is_measured: bool
    student: SoftPromptModel = field(init=False)

    @property
    def path(self) -> Path:
        return self.directory.path


def runs_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The flags of each run, by length and then by objective."""
    if values["eval_file"] is None:
        raise UsageError(
            "a sweep is measured on held-out queries: pass --eval_file, a JSON Lines file of them"
        )
    if values["resume_from_checkpoint"] is not None:
        raise UsageError(
            "resume_from_checkpoint is of one run, and a sweep has several: leave it out, and each "
            "goes on from its own last checkpoint"
        )
    for name in SWEPT:
        value, count = Counter(values[name]).most_common(1)[0]
        if count > 1:
            raise UsageError(f"{name} holds {value} {count} times: give each value once")
    return [
        {
            **values,
            "num_virtual_tokens": P,
            "objective": objective,
            "output_dir": os.path.join(values["output_dir"], f"{objective}_P{P}"),
        }
        for P in sorted(values["num_virtual_tokens"])
        for objective in values["objective"]
    ]


def sweep(
    calls: list[tuple[TrainOptions, SoftPromptConfig, SoftPromptTrainingArguments, Invocation]],
) -> int:
    """The exit code. What is trained is not trained again, and what is measured not measured.

    Raises ValueError or OSError as ``train`` does, before the model loads wherever that is known.
    """
    options, _, args, invocation = calls[0]
    if args.world_size > 1:
        raise UsageError(f"sweep runs in one process: got {args.world_size}. Start it by itself")
    for call in calls:
        check_options(*call[:3])
    data = read_data(options)
    check_data(args, len(data.records))
    directory = Path(args.output_dir or "").parent
    make_writable("output_dir", directory)
    _check_free(directory)
    facts = {
        "eval_file_sha256": data.digests["eval_file"],
        "max_new_tokens": options.max_new_tokens,
        "context_of_training": None if data.context is None else True,
    }
    with locked(directory / LOCK_FILE, wait=False) as is_ours:
        if not is_ours:
            raise ValueError(f"output_dir {directory} is in use: another process sweeps there")
        runs = [_open(*call, data, facts) for call in calls]
        code = 0 if all(run.is_measured for run in runs) else _work(runs, data, facts, invocation)
        if code:
            done = sum(run.is_measured for run in runs)
            flag = " without --overwrite_output_dir" if options.overwrite_output_dir else ""
            say(f"The sweep stops, with {done} of {len(runs)} runs measured.")
            say(f"The same command{flag} goes on with the others.")
            return code
        curve = _write_curve(runs, directory)
        Console().print(curve_table(curve))
        write_bytes(directory / PICTURE_FILE, curve_picture(curve))
        say(f"Written to {directory / CURVE_FILE}; look at {directory / PICTURE_FILE}")
    return 0


def _check_free(directory: Path) -> None:
    ours = {CURVE_FILE, PICTURE_FILE, CACHE_DIRECTORY, LOCK_FILE}
    ours |= {path.name for path in leftovers(directory, (CURVE_FILE, PICTURE_FILE))}
    names = {path.name for path in directory.iterdir()}
    others = sorted(name for name in names - ours if not RUN_NAME.fullmatch(name))
    if others and CURVE_FILE not in names:
        raise ValueError(
            f"output_dir {directory} is occupied: it holds {others[0]!r} and no {CURVE_FILE}, so "
            "it is not a sweep of softprompt-fast. Choose another directory."
        )


def _open(
    options: TrainOptions,
    config: SoftPromptConfig,
    args: SoftPromptTrainingArguments,
    invocation: Invocation,
    data: Data,
    facts: dict[str, Any],
) -> Run:
    """facts: what its report says if it is one of this sweep."""
    directory = open_directory(options, args, data, invocation.changed)
    is_done = directory.is_finished and is_measured(directory.path, facts)
    return Run(options=options, config=config, args=args, directory=directory, is_measured=is_done)


def _work(runs: list[Run], data: Data, facts: dict[str, Any], invocation: Invocation) -> int:
    """Train and measure what is left; the exit code."""
    left = [run for run in runs if not run.is_measured]
    # The teacher keeps what serves all, finished ones too: then its cache stays the same.
    most = max(runs, key=lambda run: run.args.needs_teacher_states)
    options, args = most.options, most.args
    directory = most.path.parent
    cache = TeacherCache(options.teacher_cache or directory / CACHE_DIRECTORY)
    model, tokenizer = load(options, args)
    untrained = []
    for run in left:
        if run.directory.is_finished:
            prompt = SoftPrompt.from_pretrained(run.path, model)
        else:
            prompt = SoftPrompt.from_model(model, tokenizer, run.config, data.first_context)
            untrained.append(run)
        run.student = SoftPromptModel(model, prompt)
    evaluation = Evaluation(
        model,
        tokenizer,
        data.eval_records,
        data.context,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.teacher_batch_size,
        show_progress=not args.disable_tqdm,
        backend=args.backend,
        workspace_mib=args.workspace_mib,
    )
    lessons = teach(model, tokenizer, options, args, data, cache) if untrained else None
    _check_lengths(left, evaluation, lessons)
    # All at once: after a stop, the same command without --overwrite_output_dir finds no old run.
    for run in untrained:
        run.directory.start()
    _write_curve(runs, directory)
    for number, run in enumerate(left, 1):
        progress(f"{run.path.name}, {number} of {len(left)} runs that are left")
        if lessons is not None and run in untrained:
            anew = options.overwrite_output_dir
            code = train_prompt(
                run.student, lessons, run.args, run.directory, invocation.stop, anew=anew
            )
            if code:
                return code
        _measure(run, evaluation, facts)
        _write_curve(runs, directory)
    return 0


def _check_lengths(runs: list[Run], evaluation: Evaluation, lessons: Lessons | None) -> None:
    """Raises ValueError if the longest prompt leaves too few positions, before a run begins."""
    longest = max(runs, key=lambda run: run.config.num_virtual_tokens).student
    for example in (*evaluation.examples, *(lessons.train_set if lessons else ())):
        longest.check_length(example.query, len(example.answer.ids))


def _measure(run: Run, evaluation: Evaluation, facts: dict[str, Any]) -> None:
    started = time.perf_counter()
    report = evaluation.report(run.student.prompt, num_samples=0)
    report["seconds"] = round(time.perf_counter() - started, 1)
    add_facts(report, run.path, run.directory.inputs["eval_file"])
    write_json(run.path / EVALUATION_FILE, report | facts)
    run.is_measured = True
    row = report["conditions"][SOFT]
    recovered = row["kl_recovered"]
    say(
        f"{run.path.name}: KL {kl_with_error(row)} nats"
        + ("" if recovered is None else f", {recovered:.1%} recovered")
        + f", top-1 {row['top1_agreement']:.1%}"
    )


def _write_curve(runs: list[Run], directory: Path) -> dict[str, Any]:
    curve = compression_curve([run.path for run in runs if run.is_measured])
    write_json(directory / CURVE_FILE, curve)
    return curve


COMMAND = Command(
    description="Learn a soft prompt for each of several --num_virtual_tokens and --objective, and "
    "draw how faithful they are to the context. All other flags are those of train.",
    options=(TrainOptions, SoftPromptConfig, SoftPromptTrainingArguments),
    run=sweep,
    several=SWEPT,
    split=runs_of,
)
