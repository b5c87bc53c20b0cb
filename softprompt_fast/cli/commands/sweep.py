"""The command ``sweep``: train for several lengths and objectives, and measure what comes of it.

One model, one teacher and one evaluation serve all runs; each run is what ``train`` makes of the
same flags, in a directory of its own.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from ...student.soft_prompt import SoftPromptConfig
from ...sweep.curve import SWEPT
from ...sweep.directory import SweepDirectory
from ...sweep.runs import Run, finish_runs, owned_run, paths_of_measured
from ...sweep.table import curve_table
from ...training.arguments import SoftPromptTrainingArguments, TrainOptions
from ...training.preflight import check_arguments, check_data
from ...training.setup import read_data
from ...utils.console import say
from ...utils.errors import OptionError
from ..command import Command, Invocation


def runs_of(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The flags of each run, by length and then by objective."""
    if values["eval_file"] is None:
        raise OptionError(
            "a sweep is measured on held-out queries: pass --eval_file, a JSON Lines file of them"
        )
    if values["resume_from_checkpoint"] is not None:
        raise OptionError(
            "resume_from_checkpoint is of one run, and a sweep has several: leave it out, and each "
            "goes on from its own last checkpoint"
        )
    if values["find_lr"]:
        raise OptionError("find_lr is of one run: call softprompt-fast train --find_lr")
    for name in SWEPT:
        value, count = Counter(values[name]).most_common(1)[0]
        if count > 1:
            raise OptionError(f"{name} holds {value} {count} times: give each value once")
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
        raise OptionError(
            f"sweep runs in one process: got {args.world_size}. Start it without a launcher"
        )
    for call in calls:
        check_arguments(*call[:3])
    data = read_data(options)
    check_data(args, len(data.records))
    facts = {
        "eval_file_sha256": data.digests["eval_file"],
        "max_new_tokens": options.max_new_tokens,
        "context_of_training": None if data.context is None else True,
    }
    path = Path(args.output_dir or "").parent
    with SweepDirectory(path).owned() as directory, ExitStack() as stack:
        runs = [
            stack.enter_context(owned_run(*call[:3], call[3].changed, data, facts))
            for call in calls
        ]
        directory.remove_leftovers()
        if any(not run.is_measured for run in runs):
            code = finish_runs(runs, data, facts, directory, invocation.stop)
            if code:
                _say_how_to_go_on(runs, anew=options.overwrite_output_dir)
                return code
        curve = directory.write_curve(paths_of_measured(runs))
        Console().print(curve_table(curve))
        directory.write_picture(curve)
        say(f"Written to {directory.curve}; look at {directory.picture}")
    return 0


def _say_how_to_go_on(runs: list[Run], *, anew: bool) -> None:
    flag = " without --overwrite_output_dir" if anew else ""
    say(f"The sweep stops, with {len(paths_of_measured(runs))} of {len(runs)} runs measured.")
    say(f"The same command{flag} goes on with the others.")


COMMAND = Command(
    description="Learn a soft prompt for each of several --num_virtual_tokens and --objective, and "
    "draw how faithful they are to the context. All other flags are those of train.",
    options=(TrainOptions, SoftPromptConfig, SoftPromptTrainingArguments),
    run=sweep,
    several=SWEPT,
    split=runs_of,
)
