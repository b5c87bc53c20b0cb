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
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from ...student.soft_prompt import SoftPromptConfig
from ...sweep.curve import SWEPT
from ...sweep.plot import curve_picture
from ...sweep.runs import (
    CACHE_DIRECTORY,
    CURVE_FILE,
    PICTURE_FILE,
    finish_runs,
    open_run,
    write_curve,
)
from ...sweep.table import curve_table
from ...training.arguments import SoftPromptTrainingArguments, TrainOptions
from ...training.preflight import check_arguments, check_data
from ...training.setup import read_data
from ...utils.console import say
from ...utils.errors import OptionError
from ...utils.files import check_free, leftovers, locked, make_writable, write_bytes
from ..command import Command, Invocation

LOCK_FILE = ".sweep.lock"
RUN_NAME = re.compile(r".+_P\d+")


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
        runs = [open_run(*call[:3], call[3].changed, data, facts) for call in calls]
        is_done = all(run.is_measured for run in runs)
        code = 0 if is_done else finish_runs(runs, data, facts, invocation.stop)
        if code:
            done = sum(run.is_measured for run in runs)
            flag = " without --overwrite_output_dir" if options.overwrite_output_dir else ""
            say(f"The sweep stops, with {done} of {len(runs)} runs measured.")
            say(f"The same command{flag} goes on with the others.")
            return code
        curve = write_curve(runs, directory)
        Console().print(curve_table(curve))
        write_bytes(directory / PICTURE_FILE, curve_picture(curve))
        say(f"Written to {directory / CURVE_FILE}; look at {directory / PICTURE_FILE}")
    return 0


def _check_free(directory: Path) -> None:
    ours = [PICTURE_FILE, CACHE_DIRECTORY, LOCK_FILE]
    ours += [path.name for path in leftovers(directory, (CURVE_FILE, PICTURE_FILE))]
    ours += [path.name for path in directory.iterdir() if RUN_NAME.fullmatch(path.name)]
    check_free(directory, ours=ours, mark=CURVE_FILE, what="a sweep of softprompt-fast")


COMMAND = Command(
    description="Learn a soft prompt for each of several --num_virtual_tokens and --objective, and "
    "draw how faithful they are to the context. All other flags are those of train.",
    options=(TrainOptions, SoftPromptConfig, SoftPromptTrainingArguments),
    run=sweep,
    several=SWEPT,
    split=runs_of,
)
