"""The command ``doctor``: what kind of run it was, and why its prompt did not learn."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

from ...student.soft_prompt import SoftPrompt
from ...training.checkpoints import last_good_checkpoint
from ...training.diagnosis import (
    MIN_STEPS,
    Finding,
    diagnose,
    last_loss,
    recovered,
    steps_after_warmup,
)
from ...training.log import TRAINING_LOG_FILE, TrainingLog
from ...training.run_directory import EVALUATION_FILE, RUN_FILE, read_run
from ...utils.console import one_line, say
from ...utils.files import read_json
from ..command import Argument, Command, Invocation


def examine(invocation: Invocation) -> int:
    """Prints the run, what stands out in it, and what could not be looked at.

    Raises ValueError or OSError if the directory holds no run, or its log cannot be read.
    """
    directory = Path(invocation.argument or "")
    if not invocation.argument or not directory.is_dir():
        raise ValueError(f"{invocation.argument!r} is no directory: give the output_dir of a run")
    if not (directory / RUN_FILE).is_file():
        raise ValueError(f"{directory} holds no run of softprompt-fast: it has no {RUN_FILE}")
    run, unseen = read_run(directory), list[str]()
    place = _where_its_log_is(directory, unseen)
    log = TrainingLog.read(place / TRAINING_LOG_FILE)
    held_out = _held_out(directory, unseen)
    _note_what_is_missing(log, unseen)
    say(f"{one_line(str(directory))}: {'finished' if _is_finished(run) else 'not finished'}")
    for name, text in _facts(run, place, log, held_out, unseen).items():
        say(f"  {name:<15}{one_line(text)}")
    _say_findings(diagnose(log, held_out=held_out if log.objective == "kl" else None))
    for reason in unseen:
        say(f"Not looked at: {one_line(reason)}.")
    return 0


def _where_its_log_is(directory: Path, unseen: list[str]) -> Path:
    """The run's directory, or the last whole checkpoint of a run that was killed."""
    if (directory / TRAINING_LOG_FILE).is_file():
        return directory
    with warnings.catch_warnings(record=True) as skipped:
        warnings.simplefilter("always", UserWarning)
        checkpoint = last_good_checkpoint(directory)
    unseen += [str(warning.message).rstrip(".") for warning in skipped]
    if checkpoint is None or not (checkpoint / TRAINING_LOG_FILE).is_file():
        raise ValueError(
            f"{directory} has no {TRAINING_LOG_FILE}, and no whole checkpoint with one: the run "
            "was killed before its first checkpoint, or is of an earlier version. Train it again. "
            + "; ".join(unseen)
        )
    return checkpoint


def _held_out(directory: Path, unseen: list[str]) -> float | None:
    """The recovered part on the held-out queries of ``eval``."""
    file = directory / EVALUATION_FILE
    if not file.is_file():
        unseen.append(f"held-out queries, for there is no {file}: run softprompt-fast eval")
        return None
    try:
        value = read_json(file).get("kl_recovered")
    except ValueError as error:
        unseen.append(str(error).rstrip("."))
        return None
    if isinstance(value, int | float) and abs(value) < math.inf:
        return value
    unseen.append(f"held-out queries, for {file} has no kl_recovered")
    return None


def _note_what_is_missing(log: TrainingLog, unseen: list[str]) -> None:
    steps = steps_after_warmup(log)
    if steps < MIN_STEPS:
        unseen.append(
            f"how it learns, for it has {steps} steps after warm-up, and {MIN_STEPS} are needed"
        )
    if log.context_kl is None:
        unseen.append("what the context does, for it was not measured")


def _facts(
    run: dict[str, Any],
    place: Path,
    log: TrainingLog,
    held_out: float | None,
    unseen: list[str],
) -> dict[str, str]:
    """The run in a few lines. What cannot be read is added to ``unseen``."""
    facts = {"model": str(run.get("inputs", {}).get("model"))}
    try:
        config = SoftPrompt.from_pretrained(place).config
        facts["soft prompt"] = (
            f"{config.num_virtual_tokens} virtual tokens, placement {config.placement}, "
            f"begun as {config.prompt_tuning_init}"
        )
    except (ValueError, OSError) as error:
        unseen.append(str(error).rstrip("."))
    done = log.steps[-1]["step"] if log.steps else 0
    facts |= {
        "objective": log.objective,
        "steps": f"{done} of {log.max_steps}, {log.warmup_steps} of warm-up",
        "learning rate": f"{log.learning_rate:g}",
    }
    if _is_finished(run) and isinstance(run.get("seconds"), int | float):
        facts["time"] = f"{run['seconds']:.0f} s"
    losses = {
        "without context": log.loss_without_context,
        "at the start": log.loss_at_start,
        "last": last_loss(log),
        "with context": log.loss_with_context,
    }
    known = [f"{loss:.3g} {name}" for name, loss in losses.items() if loss is not None]
    shares = {"training queries": recovered(log), "held-out ones": held_out}
    shown = [f"{share:.0%} on {name}" for name, share in shares.items() if share is not None]
    facts |= {"loss": ", ".join(known), "recovered": ", ".join(shown)}
    return {name: text for name, text in facts.items() if text}


def _say_findings(findings: list[Finding]) -> None:
    if all(finding.is_note for finding in findings):
        say("Nothing suspicious.")
    for finding in findings:
        say(f"{'Note, ' if finding.is_note else ''}{finding.kind}: {finding.what}")
        say(f"  What to try: {finding.advice}")


def _is_finished(run: dict[str, Any]) -> bool:
    return run.get("status") == "finished"


COMMAND = Command(
    description="Explain a run whose soft prompt does not learn.",
    options=(),
    run=examine,
    argument=Argument(name="dir", help="the output_dir of the run", required=True),
)
