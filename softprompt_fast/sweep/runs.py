"""The runs of a sweep: what is left of each is done, with one model, teacher and evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.baselines import SOFT
from ..evaluation.evaluate import Evaluation
from ..evaluation.report.tables import kl_with_error
from ..student.model import SoftPromptModel
from ..student.soft_prompt import SoftPrompt, SoftPromptConfig
from ..teacher.cache import TeacherCache
from ..training.arguments import SoftPromptTrainingArguments, TrainOptions
from ..training.callbacks import StopOnSignal
from ..training.run import checkpoint_to_go_on_from, train_prompt
from ..training.run_directory import EVALUATION_FILE, RunDirectory, facts_of_run
from ..training.setup import Data, Lessons, check_queries, load, owned_directory, teach
from ..utils.console import progress, say
from ..utils.files import write_json
from .curve import is_measured
from .directory import SweepDirectory


@dataclass(kw_only=True, eq=False)
class Run:
    """What ``train`` would get, and where it is."""

    options: TrainOptions
    config: SoftPromptConfig
    args: SoftPromptTrainingArguments
    directory: RunDirectory
    is_measured: bool
    student: SoftPromptModel = field(init=False)
    checkpoint: Path | None = field(init=False, default=None)
    """From which a run that is not finished goes on."""

    @property
    def path(self) -> Path:
        return self.directory.path


@contextmanager
def owned_run(
    options: TrainOptions,
    config: SoftPromptConfig,
    args: SoftPromptTrainingArguments,
    changed: dict[str, Any],
    data: Data,
    facts: dict[str, Any],
) -> Iterator[Run]:
    """changed: what the user gave. facts: what its report says if it is one of this sweep."""
    with owned_directory(options, args, data, changed) as directory:
        is_done = directory.is_finished and is_measured(directory.path, facts)
        yield Run(
            options=options, config=config, args=args, directory=directory, is_measured=is_done
        )


def finish_runs(
    runs: list[Run],
    data: Data,
    facts: dict[str, Any],
    directory: SweepDirectory,
    stop: StopOnSignal,
) -> int:
    """Train and measure what is left; the exit code."""
    left = [run for run in runs if not run.is_measured]
    # The teacher keeps what serves all, finished ones too: then its cache stays the same.
    most = max(runs, key=lambda run: run.args.needs_teacher_states)
    options, args = most.options, most.args
    cache = TeacherCache(options.teacher_cache or directory.teacher_cache)
    untrained = [run for run in left if not run.directory.is_finished]
    for run in untrained:
        run.checkpoint = checkpoint_to_go_on_from(run.args, run.directory)
    begun = [run.path if run.directory.is_finished else run.checkpoint for run in runs]
    model, tokenizer = load(
        options, args, [SoftPrompt.from_pretrained(path) for path in begun if path], cache
    )
    for run in left:
        if run in untrained:
            prompt = SoftPrompt.from_model(model, tokenizer, run.config, data.first_context)
        else:
            prompt = SoftPrompt.from_pretrained(run.path)
        run.student = SoftPromptModel(model, prompt)  # which checks whose prompt it is
    check_queries(_longest(left), tokenizer, data)
    evaluation = Evaluation(
        model,
        tokenizer,
        data.eval_records,
        data.context,
        max_new_tokens=options.max_new_tokens,
        max_context_tokens=options.max_context_tokens,
        batch_size=options.teacher_batch_size,
        show_progress=not args.disable_tqdm,
        backend=args.backend,
        workspace_mib=args.workspace_mib,
        **options.of_prefix(),
    )
    lessons = teach(model, tokenizer, options, args, data, cache) if untrained else None
    _check_lengths(left, evaluation, lessons)
    # All at once: after a stop, the same command without --overwrite_output_dir finds no old run.
    for run in untrained:
        run.directory.start()
    if options.overwrite_output_dir:
        directory.picture.unlink(missing_ok=True)
    directory.write_curve(paths_of_measured(runs))
    for number, run in enumerate(left, 1):
        progress(f"{run.path.name}, {number} of {len(left)} runs that are left")
        if lessons is not None and run in untrained:
            code = train_prompt(
                run.student,
                lessons,
                run.args,
                run.directory,
                stop,
                anew=options.overwrite_output_dir,
                checkpoint=run.checkpoint,
            )
            if code:
                return code
        _measure(run, evaluation, facts)
        directory.write_curve(paths_of_measured(runs))
    return 0


def _check_lengths(runs: list[Run], evaluation: Evaluation, lessons: Lessons | None) -> None:
    """Raises ValueError if the longest prompt leaves too few positions, before a run begins."""
    longest = _longest(runs)
    for example in (*evaluation.examples, *(lessons.train_set if lessons else ())):
        longest.check_length(example.query, len(example.answer.ids))


def _longest(runs: list[Run]) -> SoftPromptModel:
    return max(runs, key=lambda run: run.config.num_virtual_tokens).student


def _measure(run: Run, evaluation: Evaluation, facts: dict[str, Any]) -> None:
    started = time.perf_counter()
    report = evaluation.report(run.student.prompt, num_samples=0)
    report["seconds"] = round(time.perf_counter() - started, 1)
    report |= facts_of_run(run.path, run.directory.inputs["eval_file"]) | facts
    write_json(run.path / EVALUATION_FILE, report)
    run.is_measured = True
    row = report["conditions"][SOFT]
    recovered = row["kl_recovered"]
    say(
        f"{run.path.name}: KL {kl_with_error(row)} nats"
        + ("" if recovered is None else f", {recovered:.1%} recovered")
        + f", top-1 {row['top1_agreement']:.1%}"
    )


def paths_of_measured(runs: list[Run]) -> list[Path]:
    return [run.path for run in runs if run.is_measured]
