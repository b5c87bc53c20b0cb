"""kill -9 at random moments, and what must be there afterwards."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import select
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tqdm.auto

from softprompt_fast.training.checkpoints import last_good_checkpoint

Job = Callable[[Path], None]
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
HUNG = 60  # seconds, after which a child says where it hangs


# How a process dies


@dataclass(kw_only=True, frozen=True)
class Fate:
    """When a child is killed: so many seconds after its start, or at one of its operations."""

    seconds: float | None = None
    operation: int | None = None
    share: float = 1.0
    """How much of a file is on the disk if the operation was to wait for it."""


class Tripwire:
    """Counts what this process does to files, and kills it in the middle of what is fatal."""

    def __init__(self, fate: Fate) -> None:
        self.fate = fate
        self.count = 0

    def install(self) -> None:
        sys.addaudithook(self._on_event)
        fsync = os.fsync

        def counted_fsync(descriptor: int) -> None:
            if self._is_fatal():
                self._die_while_syncing(descriptor)
            fsync(descriptor)

        os.fsync = counted_fsync

    def _on_event(self, event: str, args: tuple) -> None:
        """Called before Python does what the event says."""
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and self._is_fatal():
            if writes:
                os.open(args[0], args[2])  # so it is empty now
            os.kill(os.getpid(), signal.SIGKILL)

    def _is_fatal(self) -> bool:
        self.count += 1
        return self.count == self.fate.operation

    def _die_while_syncing(self, descriptor: int) -> None:
        size = int(self.fate.share * os.fstat(descriptor).st_size)
        with contextlib.suppress(IsADirectoryError):
            os.truncate(f"/proc/self/fd/{descriptor}", size)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(kw_only=True)
class Outcome:
    killed: bool
    seconds: float
    operations: int
    error: str = ""


def in_child(job: Job, directory: Path, fate: Fate) -> Outcome:
    """A fork has all libraries loaded already, so little but the job itself is killed."""
    log = directory.with_name("child.log")
    reading, writing = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _be_the_child(job, directory, fate, log, writing)
    os.close(writing)
    if fate.seconds is not None:
        select.select([reading], [], [], fate.seconds)  # or until it has ended
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.perf_counter() - started
    with open(reading) as pipe:
        operations = int(pipe.read() or 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    failed = not killed and status != 0
    error = log.read_text()[-2000:] or f"status {status}" if failed else ""
    return Outcome(killed=killed, seconds=seconds, operations=operations, error=error)


def _be_the_child(job: Job, directory: Path, fate: Fate, log: Path, writing: int) -> None:
    code = 1
    try:
        sys.stdout = sys.stderr = log.open("w")
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
        faulthandler.dump_traceback_later(HUNG, exit=True, file=sys.stderr)
        torch.set_num_threads(1)  # the threads of the parent's pool are not here
        for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):
            # Theirs is a semaphore of all forks, which a killed one never gives back.
            bar.set_lock(threading.RLock())
        tripwire = Tripwire(fate)
        tripwire.install()
        job(directory)
        os.write(writing, str(tripwire.count).encode())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# What must be there afterwards


@dataclass(kw_only=True)
class Durable:
    """What a job has done for good: its cache, its newest whole checkpoint, its soft prompt."""

    files: dict[str, bytes]
    inodes: dict[str, int]
    step: int

    @classmethod
    def of(cls, directory: Path) -> Durable:
        cached = [path for path in (directory / "cache").glob("[!.]*") if path.exists()]
        prompt = (directory / "run").glob("adapter_model.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = last_good_checkpoint(directory / "run")
        return cls(
            files={path.name: path.read_bytes() for path in (*cached, *prompt)},
            inodes={path.name: path.stat().st_ino for path in cached},
            step=0 if checkpoint is None else int(checkpoint.name.split("-")[1]),
        )

    def lost(self, later: Durable, expected: dict[str, bytes]) -> list[str]:
        """What was here and is not in ``later``, and what is there and should not be."""
        redone = [n for n in self.inodes if later.inodes.get(n) != self.inodes[n]]
        wrong = [n for n in later.files if later.files[n] != expected.get(n)]
        return [
            *(f"{name} was whole, and is gone or was made again" for name in redone),
            *(f"{name} is not that of an undisturbed run" for name in wrong),
            *([f"from step {self.step} back to {later.step}"] if later.step < self.step else []),
        ]


@dataclass(kw_only=True)
class Killed:
    by_time: int = 0
    by_operation: int = 0
    runs: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.by_time + self.by_operation

    def __str__(self) -> str:
        return (
            f"{self.kills} kills ({self.by_time} at a moment, {self.by_operation} at an operation) "
            f"in {self.runs} runs, {len(self.problems)} problems"
        )


def kill(
    job: Job, folder: Path, kills: int, rng: random.Random, report: Callable[[str], None]
) -> Killed:
    """Start the job, kill it, start it again until it is done; then anew, until ``kills``."""
    folder.mkdir()
    # Twice: the first one may be slow, and most moments of a long time would be past the end.
    whole = {folder / name: in_child(job, folder / name, Fate()) for name in ("one", "other")}
    assert not any(outcome.error for outcome in whole.values()), whole
    undisturbed = min(whole.values(), key=lambda outcome: outcome.seconds)
    expected, again = (Durable.of(directory).files for directory in whole)
    assert expected == again
    all_names = _names_in(folder / "one")
    killed = Killed()
    while killed.kills < kills and not killed.problems:
        killed.runs += 1
        directory = folder / f"run{killed.runs}"
        state, outcome = Durable(files={}, inodes={}, step=0), None
        while outcome is None or outcome.killed:
            fate = _draw(undisturbed, killed, rng) if killed.kills < kills else Fate()
            outcome = in_child(job, directory, fate)
            killed.by_time += outcome.killed and fate.seconds is not None
            killed.by_operation += outcome.killed and fate.operation is not None
            before, state = state, Durable.of(directory)
            killed.problems += [f"{fate}: {text}" for text in before.lost(state, expected)]
        if outcome.error:
            killed.problems.append(f"{fate}: the job failed: {outcome.error}")
        differing = sorted(all_names ^ _names_in(directory))
        killed.problems += [f"{name} is left over or missing" for name in differing]
        report(str(killed))
        shutil.rmtree(directory)
    return killed


def _names_in(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def _draw(undisturbed: Outcome, killed: Killed, rng: random.Random) -> Fate:
    """Of either kind equally many."""
    if killed.by_time <= killed.by_operation:
        return Fate(seconds=rng.uniform(0, undisturbed.seconds))
    return Fate(operation=rng.randint(1, undisturbed.operations), share=rng.random())
