"""Processes of ``make gpu``: each has its time; output goes to the log, records to the results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpu.results import Record, Results

ROOT = Path(__file__).parents[2]
# What a process gets to say why it was interrupted, before it is killed.
GRACE_SECONDS = 8


class StepFailed(Exception):
    """The reason goes into the results; the other steps go on."""


class StepSkipped(Exception):
    """There is nothing to do here."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    records: list[Record]
    tail: list[str]
    """its last lines"""
    stopped: str | None
    """why it was interrupted"""

    @property
    def problem(self) -> str | None:
        if self.stopped is not None:
            return self.stopped
        if self.code == 0:
            return None
        lines = [line for line in self.tail if line.strip()] or ["no output"]
        return f"exit code {self.code}: {lines[-1].strip(' =')[:300]}"


class Session:
    """One run of ``make gpu``: options, time, results, log, and the processes that are alive."""

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self.options = options
        self.rehearsal: bool = options.rehearse
        self.start = time.monotonic()
        self.results = Results(options.output, name)
        options.log.parent.mkdir(parents=True, exist_ok=True)
        self.log = options.log.open("w")
        self.package = (options.output if self.rehearsal else ROOT / "build") / "gpu-package"
        self._alive: set[subprocess.Popen] = set()
        self._ended = False

    def left(self) -> float:
        return self.options.seconds - (time.monotonic() - self.start)

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:5.0f} s] {text}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def environment(self) -> dict[str, str]:
        """The installed package is found, and not the sources in the current directory."""
        ours = [self.package] if self.package.exists() else []
        paths = [
            *ours,
            ROOT / "benchmarks",
            ROOT / "tests" / "support",
            os.environ.get("PYTHONPATH"),
        ]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if self.rehearsal:
            environment.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
        return environment

    def python(self, program: str, *arguments: str, seconds: float, **options) -> Ended:
        path = str(ROOT / program)
        return self.process([sys.executable, path, *arguments], seconds=seconds, **options)

    def process(
        self,
        command: list[str],
        *,
        seconds: float,
        silence: float | None = None,
        environment: dict[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Ended:
        """Run until it ends, has had its ``seconds``, or has been silent for too long."""
        if self._ended:
            raise StepFailed("cut off")
        words = [part for part in command[1:] if not part.startswith(("-", "["))]
        name = " ".join(Path(word).name for word in words[:3])
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=ROOT,
            env=environment or self.environment(),
            start_new_session=True,
        )
        self._alive.add(process)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process, lines), daemon=True).start()
        records: list[Record] = []
        tail: list[str] = []
        stopped = None
        deadline, heard = started + seconds, started
        while True:
            now = time.monotonic()
            quiet = silence is not None and stopped is None and now >= heard + silence
            if now >= deadline or quiet:
                if stopped is not None:
                    break
                why = "no sign of life" if now < deadline else "out of time"
                stopped = f"{why} after {now - started:.0f} s"
                _signal(process, signal.SIGINT)
                deadline = now + GRACE_SECONDS
            try:
                line = lines.get(timeout=0.5)
            except queue.Empty:
                continue
            heard = time.monotonic()
            if line is None:
                break
            if line.startswith("@{"):
                records.append(self._keep(json.loads(line[1:])))
            else:
                tail = [*tail[-80:], line]
                print(f"    {name} | {line}", file=self.log, flush=True)
                if on_line is not None:
                    on_line(line)
        _signal(process, signal.SIGKILL)
        code = process.wait()
        self._alive.discard(process)
        ended = Ended(code, records, tail, stopped)
        if ended.problem is not None:
            self.say(f"{name}: {ended.problem}")
        return ended

    def _keep(self, record: Record) -> Record:
        table = record.pop("table")
        self.results.add(table, record)
        facts = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items())
        self.say(f"{table}: {' '.join(facts)}")
        return record

    def end(self) -> None:
        """Nothing that was started here stays alive, and nothing more is started."""
        self._ended = True
        for process in list(self._alive):
            _signal(process, signal.SIGKILL)
        self.log.flush()


def _read(process: subprocess.Popen, lines: queue.Queue) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _signal(process: subprocess.Popen, number: int) -> None:
    """To the process and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
