"""The steps of ``make gpu`` that check: a first look, the tests, compute-sanitizer.

Each takes the session and its seconds, and says what came of it, or raises ``StepFailed`` or
``StepSkipped`` with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import time
from collections import Counter

from gpu.cases import BACKENDS
from gpu.process import ROOT, Ended, Session, StepFailed, StepSkipped
from gpu.steps import all_of, backend_problems, together, usable_backends

TESTS = ["tests/backends/test_gpu.py", "tests/losses/test_functional.py"]
NEEDS_GGUF = "tests/base_model/test_loading.py"
TEST_SECONDS = 120
# Lines of pytest -v, with and without pytest-xdist.
RESULT_WITH_XDIST = r"\[gw\d+\] \[ *\d+%\] ([A-Z]+) tests/"
RESULT = r"tests/.*?::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]$"
SANITIZERS = ("memcheck", "racecheck")
NO_TOOL = "no tool"
FINDINGS = 77  # exit code


def smoke(session: Session, seconds: float) -> str:
    """Every loss on every backend once: the backends side by side, for compiling takes a core."""

    def check(backend: str) -> Ended:
        return session.python("benchmarks/gpu/smoke.py", "contract", backend, seconds=seconds)

    backends = [name for name, why in backend_problems(session).items() if why is None]
    return all_of(backends, together(check, backends))


def tests(session: Session, seconds: float) -> str:
    """The laws that need a GPU, and the numerics contract."""
    chosen = session.options.tests
    if chosen is None:
        chosen = TESTS[:1] if session.rehearsal else TESTS
    return _pytest(session, seconds, chosen, workers=8)


def other_tests(session: Session, seconds: float) -> str:
    if session.rehearsal:
        raise StepSkipped("make test runs them")
    chosen = ["tests", *(f"--ignore={path}" for path in TESTS)]
    if importlib.util.find_spec("gguf") is None:
        chosen.append(f"--ignore={NEEDS_GGUF}")
        session.say(f"{NEEDS_GGUF} is left out: gguf is not installed")
    return _pytest(session, seconds, chosen, workers=6)


def _pytest(session: Session, seconds: float, arguments: list[str], workers: int) -> str:
    """Results are counted as they come, so that they are known when time runs out."""
    command = [sys.executable, "-m", "pytest"]
    if sys.version_info < (3, 11):  # -m would put the sources before the package
        command = [shutil.which("pytest") or "pytest"]
    command += [*arguments, "-v", "--tb=short", "--show-capture=no"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") and not session.rehearsal:
        command += ["-n", str(workers)]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={TEST_SECONDS}"]
    counts: Counter[str] = Counter()

    def count(line: str) -> None:
        if result := re.match(RESULT_WITH_XDIST, line) or re.match(RESULT, line):
            counts[result[1].lower()] += 1
        elif failure := re.match(r"(?:FAILED|ERROR) (tests/\S.*)", line):
            test, _, why = failure[1].partition(" - ")
            session.results.add("failed_tests", {"test": test, "why": why[:200]})
            session.say(line[:200])

    environment = {**session.environment(), "OMP_NUM_THREADS": "2", "COLUMNS": "250"}
    ended = session.process(command, seconds=seconds, environment=environment, on_line=count)
    said = ", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "no test ran"
    if ended.problem is not None or not counts["passed"]:
        raise StepFailed(f"{said}; {ended.problem}")
    return said


def sanitize(session: Session, seconds: float) -> str:
    """compute-sanitizer over every kernel. A rehearsal runs the program without it."""
    path = f"{os.environ['PATH']}:/usr/local/cuda/bin"
    tool = None if session.rehearsal else shutil.which("compute-sanitizer", path=path)
    if tool is None and not session.rehearsal:
        raise StepSkipped("compute-sanitizer is not installed")
    stop = time.monotonic() + seconds

    def run(check: str, backend: str) -> str:
        command = [sys.executable, str(ROOT / "tests" / "support" / "sanitize.py"), backend]
        if check != NO_TOOL:
            options = ["--tool", check, "--target-processes", "application-only"]
            options += ["--error-exitcode", str(FINDINGS), "--print-limit", "10"]
            command = [tool, *options, *command]
        ended = session.process(command, seconds=stop - time.monotonic())
        outcome, detail = _sanitizer_says(ended)
        session.results.add(
            "sanitizer", {"tool": check, "kernels": backend, "outcome": outcome, "detail": detail}
        )
        session.say(f"{check}, {backend}: {outcome}. {detail}")
        return outcome

    def run_all(backend: str) -> list[str]:
        """Without a tool first: that compiles, and shows whether the program runs at all."""
        return [run(check, backend) for check in (NO_TOOL, *(SANITIZERS if tool else ()))]

    of_backends = together(run_all, usable_backends(session, BACKENDS))
    outcomes = [outcome for outcomes in of_backends for outcome in outcomes]
    if "failed" in outcomes:
        raise StepFailed("see the table; the log has what was found")
    if "refused" in outcomes:
        raise StepSkipped("compute-sanitizer refuses this device")
    return f"{len(outcomes)} runs"


def _sanitizer_says(ended: Ended) -> tuple[str, str]:
    """(ok, failed or refused; its last words)"""
    text = "\n".join(ended.tail)
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    detail = ended.problem if not summary or ended.stopped else summary[-1]
    if re.search(r"[Dd]evice not supported", text):
        return "refused", detail or "Device not supported"
    if ended.problem is not None:
        return "failed", detail or ended.problem
    return "ok", detail or (ended.tail[-1] if ended.tail else "")


def batches(session: Session, seconds: float) -> str:
    """Reported, not required: cuBLAS picks its algorithm by the shape."""

    def measure(backend: str) -> Ended:
        return session.python("benchmarks/gpu/smoke.py", "batch", backend, seconds=seconds)

    backends = usable_backends(session, BACKENDS)
    return all_of(backends, together(measure, backends))
