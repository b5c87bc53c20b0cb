"""The output directory of one training run: who owns it, and with which options it was started.

run.json             the options, where the data is, "training" or "finished"
checkpoint-N/        written by the trainer
adapter_*, soft_prompt.json, training_log.json, evaluation*    the results
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO, Any

from ..student.soft_prompt import FACTS_FILE, PEFT_FILE, WEIGHTS_FILE
from ..utils.files import check_free, leftovers, make_writable, read_json, write_json
from .log import TRAINING_LOG_FILE, TrainingLog

RUN_FILE = "run.json"
EVALUATION_FILE = "evaluation.json"
LOCK_FILE = ".lock"
EVALUATION_FILES = (EVALUATION_FILE, "evaluation.html", "evaluation_*.png")  # patterns
RESULT_FILES = (WEIGHTS_FILE, PEFT_FILE, FACTS_FILE, TRAINING_LOG_FILE, *EVALUATION_FILES)
FORMAT_VERSION = 1


class RunDirectory:
    """Made before the model loads: whatever is wrong with the directory is said at once."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        options: dict[str, Any],
        *,
        inputs: dict[str, Any],
        overwrite: bool,
        owner: bool = True,
    ):
        """options: what decides the result of the run; a run with others is not continued.
        inputs: where the model and the data are, for the commands that come after. JSON values.
        owner: False in all processes of a run but one: they read, and write nothing.

        Raises OSError if the directory cannot be written to, and ValueError if it is in use, holds
        something else, or holds a run with other options (unless ``overwrite``).
        """
        self.path = Path(path)
        self.options = options
        self.inputs = inputs
        self.overwrite = overwrite
        self.owner = owner
        if owner:
            make_writable("output_dir", self.path)
            self._check_free()
            self._lock = _lock(self.path)
        self._check_options()

    @property
    def is_finished(self) -> bool:
        files = all((self.path / name).is_file() for name in (WEIGHTS_FILE, FACTS_FILE))
        return not self.overwrite and files and self._read().get("status") == "finished"

    def start(self) -> None:
        """Take the directory for this run; with ``overwrite``, an earlier run goes only now."""
        if not self.owner:
            return
        for temporary in leftovers(self.path, (RUN_FILE, *RESULT_FILES)):
            temporary.unlink()
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
        if self.owner:
            self._write("finished", **facts)

    def _check_free(self) -> None:
        ours = [LOCK_FILE, *(path.name for path in leftovers(self.path, [RUN_FILE]))]
        check_free(self.path, ours=ours, mark=RUN_FILE, what="a run of softprompt-fast")

    def _check_options(self) -> None:
        now = self.options
        found = self._read().get("options", now)
        differing = [
            f"{name}: {found.get(name, 'default')!r} there, {now.get(name, 'default')!r} now"
            for name in sorted(found.keys() | now.keys())
            if found.get(name) != now.get(name)
        ]
        if differing and not self.overwrite:
            raise ValueError(
                f"output_dir {self.path} holds a run with other options: {'; '.join(differing)}. "
                "Choose another directory, or pass --overwrite_output_dir to train anew."
            )

    def _read(self) -> dict[str, Any]:
        return read_run(self.path)

    def _write(self, status: str, **facts: Any) -> None:
        run = {"format_version": FORMAT_VERSION, "status": status, "inputs": self.inputs}
        write_json(self.path / RUN_FILE, {**run, "options": self.options, **facts})


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What run.json says; empty where there is none. Raises ValueError naming what is damaged."""
    file = Path(path) / RUN_FILE
    if not file.is_file():
        return {}
    run = read_json(file)
    for name in ("inputs", "options"):
        _check_kind(file, name, run.get(name, {}), dict)
    for name, value in run.get("inputs", {}).items():
        if value is not None:
            _check_kind(file, name, value, int if name == "max_new_tokens" else str)
    return run


def facts_of_run(prompt_dir: str | Path, eval_file: str) -> dict[str, Any]:
    """What a report says of the run besides the measurements."""
    log = Path(prompt_dir) / TRAINING_LOG_FILE
    return {
        "objective": read_run(prompt_dir).get("objective"),
        "eval_file": str(eval_file),
        "training_curve": TrainingLog.read(log).curve() if log.is_file() else None,
    }


def _check_kind(file: Path, name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(
            f"{file} is damaged: {name} must be of type {kind.__name__}, got {value!r}."
        )


def _lock(path: Path) -> IO[str]:
    """A locked file; the system releases it when this process ends, however it ends."""
    file = (path / LOCK_FILE).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"output_dir {path} is in use: another process trains there") from None
    return file
