"""``make gpu``: build, check, time and sanitize everything on the GPU of this machine.

    python3 benchmarks/gpu/run.py                      # to benchmarks/results/<gpu>.{json,md}
    python3 benchmarks/gpu/run.py --only main,kernels  # some steps, of what was built before
    python3 benchmarks/gpu/run.py --rehearse           # every step on a CPU: tiny and interpreted

Nothing is downloaded: it runs with the python3 and the PyTorch that are here. Every step runs in
processes of its own, so that a crash or a hang takes nothing else along. The results are written
after every record. Exit code 1 if a step failed, or had no time left.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu import checks, steps
from gpu.process import ROOT, Session, StepFailed, StepSkipped


class Step(NamedTuple):
    name: str
    seconds: float
    """at most, and no more than what is left in all"""
    function: Callable[[Session, float], str]
    """(session, seconds) -> what there is to say about it"""


# Steps of one group run side by side: none of them is timed, and all of them wait a lot.
GROUPS: list[list[Step]] = [
    [Step("build", 240, steps.build)],
    [Step("versions", 60, steps.versions)],
    [Step("smoke", 100, checks.smoke)],
    [Step("ceilings", 40, steps.ceilings)],
    [Step("main", 110, steps.main_losses)],
    [
        Step("tests", 210, checks.tests),
        Step("other-tests", 210, checks.other_tests),
        Step("sanitize", 210, checks.sanitize),
    ],
    [Step("kernels", 60, steps.row_kernels)],
    [Step("other", 240, steps.other_losses)],
    [Step("streaming", 120, steps.streaming_losses)],
    [Step("batches", 60, checks.batches)],
]
NAMES = [step.name for group in GROUPS for step in group]


def run_step(session: Session, step: Step) -> bool:
    """Did it succeed, or was there nothing to do? Its outcome is kept and printed."""
    seconds = min(step.seconds, session.left())
    start = time.monotonic()
    session.say(f"== {step.name}: at most {max(seconds, 0):.0f} s")
    try:
        if seconds < 5:
            raise StepFailed("no time was left")
        outcome, detail = "ok", step.function(session, seconds)
    except StepFailed as problem:
        outcome, detail = "failed", str(problem)
    except StepSkipped as reason:
        outcome, detail = "skipped", str(reason)
    session.results.add(
        "steps",
        {
            "step": step.name,
            "outcome": outcome,
            "seconds": round(time.monotonic() - start, 1),
            "detail": detail,
        },
    )
    session.say(f"== {step.name}: {outcome}. {detail}")
    return outcome != "failed"


def machine_facts(options: argparse.Namespace) -> dict[str, str | bool | None]:
    """What can be known without PyTorch."""

    def says(*command: str) -> str | None:
        if shutil.which(command[0]) is None:
            return None
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else None

    fields = "name,driver_version,memory.total"
    query = (
        None
        if options.rehearse
        else says("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    )
    name, driver, memory = query.splitlines()[0].split(", ") if query else ["rehearsal", None, None]
    nvcc = re.search(r"release (\S+),", says("nvcc", "--version") or "")
    return {
        "gpu": name,
        "driver": driver,
        "memory": memory,
        "nvcc": nvcc and nvcc[1],
        "commit": options.commit or says("git", "rev-parse", "--short", "HEAD") or "unknown",
        "changes": bool(says("git", "status", "--porcelain")),
        "date": time.strftime("%Y-%m-%d"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=520, help="in all (default 520)")
    parser.add_argument("--only", help=f"some of: {','.join(NAMES)}")
    parser.add_argument("--rehearse", action="store_true", help="tiny and interpreted, on the CPU")
    parser.add_argument("--output", type=Path, help="directory of the results and the log")
    parser.add_argument("--commit", help="where git cannot tell it")
    parser.add_argument("--tests", nargs="*", help="what the step 'tests' hands to pytest")
    options = parser.parse_args()
    options.only = NAMES if options.only is None else options.only.split(",")
    if unknown := set(options.only) - set(NAMES):
        parser.error(f"--only: no step {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    options.log = (options.output or ROOT / "build") / "gpu.log"
    if options.output is None:
        # a part of a run must not replace a whole one
        complete = ROOT / "benchmarks" / "results"
        options.output = complete if options.only == NAMES else ROOT / "build" / "gpu-results"
        if options.rehearse:
            options.output = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    return options


def main() -> int:
    options = parse_arguments()
    facts = machine_facts(options)
    if facts["gpu"] == "rehearsal" and not options.rehearse:
        print("make gpu needs a GPU: nvidia-smi shows none. --rehearse runs every step on the CPU.")
        return 1
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"]).lower()).strip("-")
    session = Session(options, name)
    session.results.add("machine", facts)

    def cut_off(number: int, _frame: object) -> None:
        session.end()
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, cut_off)
    session.say(f"{facts['gpu']}, commit {facts['commit']}, {options.seconds:.0f} s in all")
    succeeded = True
    try:
        for group in GROUPS:
            chosen = [step for step in group if step.name in options.only]
            with ThreadPoolExecutor(max(len(chosen), 1)) as pool:
                outcomes = list(pool.map(lambda step: run_step(session, step), chosen))
            succeeded = succeeded and all(outcomes)
    finally:
        session.end()
    session.say(f"{session.results.markdown}, log {options.log}")
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
