"""The steps of ``make gpu`` that build and time; ``checks.py`` has the others.

Each takes the session and its seconds, and says what came of it, or raises ``StepFailed`` or
``StepSkipped`` with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from gpu.cases import ROW_KERNEL_BACKENDS, Case, main_cases, other_cases
from gpu.process import ROOT, Ended, Session, StepFailed, StepSkipped

# A case that says nothing for so long hangs: compiling its kernels takes a few seconds.
SILENCE_SECONDS = 75


def build(session: Session, seconds: float) -> str:
    """Installs the package into a directory of its own: what is installed is what is tested."""
    shutil.rmtree(session.package, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--verbose"]
    command += ["--no-index", "--no-build-isolation", "--no-deps"]
    command += ["--target", str(session.package), "."]
    start = time.monotonic()
    ended = session.process(command, seconds=seconds, environment=dict(os.environ))
    if ended.problem is None:
        return f"built and installed in {time.monotonic() - start:.0f} s"
    for line in ended.tail[-15:]:
        session.say(f"    {line}")
    shutil.rmtree(session.package, ignore_errors=True)
    package = session.package / "softprompt_fast"
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
    shutil.copytree(ROOT / "softprompt_fast", package, ignore=ignored)
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=ignored)
    raise StepFailed(f"{ended.problem}; the Python sources, Triton's kernels too, stand in for it")


def versions(session: Session, seconds: float) -> str:
    """What is installed. A backend that cannot run on a GPU machine is a failure."""
    problems = backend_problems(session, seconds)
    machine = session.results.data["machine"]
    if session.package.exists() and not machine["package"].startswith(str(session.package)):
        raise StepFailed(f"{machine['package']} is not what was installed")
    missing = [f"{name} ({why})" for name, why in problems.items() if why]
    said = f"backends missing: {', '.join(missing) or 'none'}"
    if missing and not session.rehearsal:
        raise StepFailed(said)
    return said


def ceilings(session: Session, seconds: float) -> str:
    expect(session.python("benchmarks/gpu/measure.py", "ceilings", seconds=seconds))
    return "copy and matrix product"


def main_losses(session: Session, seconds: float) -> str:
    return _losses(session, seconds, main_cases(ROW_KERNEL_BACKENDS))


def other_losses(session: Session, seconds: float) -> str:
    return _losses(session, seconds, other_cases(ROW_KERNEL_BACKENDS))


def streaming_losses(session: Session, seconds: float) -> str:
    return _losses(session, seconds, main_cases(("streaming",)))


def _losses(session: Session, seconds: float, cases: list[Case]) -> str:
    """One process for all cases; where one fails, another process goes on with the next."""
    problems = backend_problems(session)
    todo = [case for case in cases if problems.get(case.backend) is None]
    if session.rehearsal:
        todo = list(dict.fromkeys(case.tiny() for case in todo))
    if not todo:
        raise StepSkipped("none of the backends can run")
    count, failures, stop = len(todo), [], time.monotonic() + seconds
    while todo:
        ended = session.python(
            "benchmarks/gpu/measure.py",
            "losses",
            json.dumps([asdict(case) for case in todo]),
            seconds=stop - time.monotonic(),
            silence=SILENCE_SECONDS,
        )
        todo = todo[len(ended.records) :]
        if todo and time.monotonic() >= stop:
            failures.append(f"no time for {'; '.join(map(str, todo))}")
            break
        if todo:
            failures.append(f"{todo[0]}: {ended.problem or 'no record'}")
            todo = todo[1:]
    if failures:
        raise StepFailed("; ".join(failures))
    return f"{count} cases"


def row_kernels(session: Session, seconds: float) -> str:
    backends = usable_backends(session, ROW_KERNEL_BACKENDS)
    stop = time.monotonic() + seconds

    def measure(backend: str) -> Ended:
        left = stop - time.monotonic()
        return session.python("benchmarks/gpu/row_kernels.py", backend, seconds=left)

    return all_of(backends, [measure(backend) for backend in backends])


def backend_problems(session: Session, seconds: float = 60) -> dict[str, str | None]:
    """Why a backend cannot run: asked once, and kept with the other facts of the machine."""
    if "backends" not in session.results.data["machine"]:
        expect(session.python("benchmarks/gpu/smoke.py", "versions", seconds=seconds))
    return session.results.data["machine"]["backends"]


def usable_backends(session: Session, backends: tuple[str, ...]) -> list[str]:
    problems = backend_problems(session)
    usable = [backend for backend in backends if problems.get(backend) is None]
    if not usable:
        raise StepSkipped("none of the backends can run")
    return usable


def together(function: Callable[[Any], Any], jobs: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(max(len(jobs), 1)) as pool:
        return list(pool.map(function, jobs))


def all_of(names: list[str], ended: list[Ended]) -> str:
    """The names, if every process ended well and no record of it has a problem."""
    problems = []
    for name, end in zip(names, ended, strict=True):
        if end.problem is not None:
            problems.append(f"{name}: {end.problem}")
        problems += [f"{name}: {r['problem']}" for r in end.records if r.get("problem") is not None]
    if problems:
        raise StepFailed("; ".join(problems))
    return ", ".join(names)


def expect(ended: Ended) -> None:
    if ended.problem is not None:
        raise StepFailed(ended.problem)
