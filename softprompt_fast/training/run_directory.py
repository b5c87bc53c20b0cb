"""The output directory of one training run: who owns it, and with which options it was started.

run.json             the options, where the data is, "training" or "finished"
checkpoint-N/        written by the trainer
adapter_*, soft_prompt.json, training_log.json, evaluation*    the results
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..student.soft_prompt import FACTS_FILE, PEFT_FILE, WEIGHTS_FILE
from ..utils.owned_directory import OwnedDirectory, check_kind, read_state
from .log import TRAINING_LOG_FILE, TrainingLog

RUN_FILE = "run.json"
EVALUATION_FILE = "evaluation.json"
EVALUATION_FILES = (EVALUATION_FILE, "evaluation.html", "evaluation_*.png")  # patterns
RESULT_FILES = (WEIGHTS_FILE, PEFT_FILE, FACTS_FILE, TRAINING_LOG_FILE, *EVALUATION_FILES)
FORMAT_VERSION = 1


class RunDirectory(OwnedDirectory):
    what = "a run of softprompt-fast"
    holds = "a run"
    use = "trains"
    state_file = RUN_FILE
    files = RESULT_FILES
    absent = "default"
    remedy = "pass --overwrite_output_dir to train anew"

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: dict[str, Any],
        *,
        inputs: dict[str, Any],
        overwrite: bool,
        is_owner: bool = True,
    ):
        """options: what decides the result of the run; a run with others is not continued, unless
        ``overwrite``. inputs: where the model and the data are, for the commands that come after.
        JSON values.
        """
        super().__init__(path, options, is_owner=is_owner)
        self.inputs = inputs
        self.overwrite = overwrite

    @property
    def is_finished(self) -> bool:
        files = all((self.path / name).is_file() for name in (WEIGHTS_FILE, FACTS_FILE))
        return not self.overwrite and files and self.read_state().get("status") == "finished"

    def start(self) -> None:
        """Take the directory for this run; with ``overwrite``, an earlier run goes only now."""
        if not self.is_owner:
            return
        self.remove_leftovers()
        if self.overwrite:
            for checkpoint in self.path.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            for pattern in RESULT_FILES:
                for file in self.path.glob(pattern):
                    file.unlink()
            self.overwrite = False
        # Of the part of this run that ended early; the checkpoints know what is in it.
        (self.path / TRAINING_LOG_FILE).unlink(missing_ok=True)
        self._write("training")

    def finish(self, **facts: Any) -> None:
        """The prompt is saved: the same command has nothing left to do."""
        if self.is_owner:
            self._write("finished", **facts)

    def read_state(self) -> dict[str, Any]:
        return read_run(self.path)

    def check_same(self, there: Mapping[str, Any], now: Mapping[str, Any], problem: str) -> None:
        if not self.overwrite:
            super().check_same(there, now, problem)

    def _write(self, status: str, **facts: Any) -> None:
        run = {"format_version": FORMAT_VERSION, "status": status, "inputs": self.inputs}
        self.write_state({**run, "options": self.options, **facts})


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What run.json says; empty where there is none. Raises ValueError naming what is damaged."""
    file = Path(path) / RUN_FILE
    run = read_state(file, inputs=dict, options=dict)
    for name, value in run.get("inputs", {}).items():
        kind = int if name in ("max_new_tokens", "max_context_tokens") else str
        if value is not None:
            check_kind(file, name, value, kind)
    return run


def facts_of_run(prompt_dir: str | Path, eval_file: str) -> dict[str, Any]:
    """What a report says of the run besides the measurements."""
    log = Path(prompt_dir) / TRAINING_LOG_FILE
    return {
        "objective": read_run(prompt_dir).get("objective"),
        "eval_file": str(eval_file),
        "training_curve": TrainingLog.read(log).curve() if log.is_file() else None,
    }
