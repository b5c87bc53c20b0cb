"""Why a soft prompt does not learn, from the log of its training.

*Recovered* is the part of the way from the loss without the context to the loss with it: 0 is as
good as nothing in the context's place, 1 as good as the context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, median, stdev

from ..teacher.examples import OFTEN_CUT
from .log import TrainingLog

# Steps after warm-up before which a curve says nothing.
MIN_STEPS = 10

# Nats a token. SmolLM2-135M: 4e-12 for the system prompt that its template has by default, 0.06 for
# one that says the same in other words, 0.5 for the handbook, of which training leaves 0.13.
NOTHING_TO_COMPRESS = 0.01

# Half of the way is what a prompt without a fault passes; below a tenth, it has not set out.
POOR, NOTHING_RECOVERED = 0.5, 0.1

# The optimiser's eps is 1e-8 an entry. From this norm down, spread over ten thousand entries, it
# outweighs the gradient.
VANISHED = 1e-6

ALWAYS = 0.95  # of the steps

# A prompt that learned has moved by 0.4 to 5 times its own length, in the example and in the tests.
# After a tenth it is near where it began; at twenty times, it is far from all that the model knows.
HARDLY_MOVED, MOVED_FAR = 0.1, 20.0

# How far the loss is above that of the start. Of single batches, while training goes on, much more
# is chance.
ROSE, BATCHES_ROSE = 1.1, 1.5

# Below this part of the loss of the start, a run that goes on has set out.
FALLING = 0.9

# Between training queries and held-out ones; in the example it is 0.1.
OVERFITTED = 0.3


@dataclass(frozen=True, kw_only=True)
class Finding:
    kind: str
    what: str
    """What was seen, with the numbers."""

    advice: str
    is_note: bool = False
    """Worth knowing, and no reason why a prompt would not learn."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} {self.advice}"


def diagnose(log: TrainingLog, *, held_out: float | None = None) -> list[Finding]:
    """What is wrong with a run, causes before symptoms; empty if nothing stands out.

    held_out: the recovered part on held-out queries, where it was measured.
    """
    found = [_not_finite(log), _nothing_to_compress(log)]
    if not any(found) and steps_after_warmup(log) >= MIN_STEPS:
        found = [check(log) for check in (_vanished, _too_high, _too_low, _clipped)]
        found += [None if any(found) else _not_learning(log), _overfitted(log, held_out)]
    return [finding for finding in [*found, _cut(log)] if finding is not None]


def recovered(log: TrainingLog, loss: float | None = None) -> float | None:
    """Of ``loss``, by default the run's last; None where there is no way to go, or no log of it."""
    loss = last_loss(log) if loss is None else loss
    nothing, context = log.loss_without_context, log.loss_with_context
    if loss is None or nothing is None or context is None:
        return None
    if nothing - context < NOTHING_TO_COMPRESS:
        return None
    return (nothing - loss) / (nothing - context)


def last_loss(log: TrainingLog) -> float | None:
    """At the end, on the sample of the queries; before that, the mean over the last steps."""
    if log.loss_at_end is not None or not log.steps:
        return log.loss_at_end
    return fmean(_last_losses(log))


def steps_after_warmup(log: TrainingLog) -> int:
    # A run that an earlier version began has no log of its first steps.
    last = log.steps[-1]["step"] if log.steps else 0
    return min(len(log.steps), max(0, last - log.warmup_steps))


def _not_finite(log: TrainingLog) -> Finding | None:
    if log.not_finite_step is None:
        return None
    return Finding(
        kind="learning rate too high",
        what=f"The loss was not finite after step {log.not_finite_step}, and the run ended there.",
        advice=f"Lower --learning_rate (now {log.learning_rate:g}); --find_lr looks for one. If it "
        "happens at once with a small one too, look at the examples that the error named.",
    )


def _nothing_to_compress(log: TrainingLog) -> Finding | None:
    if log.context_kl is None or log.context_kl >= NOTHING_TO_COMPRESS:
        return None
    return Finding(
        kind="nothing to compress",
        what="The answers do not depend on the context: with it and without it, the model's "
        f"distributions differ by {log.context_kl:.2g} nats a token.",
        advice="Ask queries that need the context (--train_file), and see that --context_file is "
        "the right one and is no default of the model's chat template.",
    )


def _cut(log: TrainingLog) -> Finding | None:
    if log.cut_answers < max(1, OFTEN_CUT * log.answers):
        return None
    return Finding(
        kind="cut answers",
        what=f"{log.cut_answers} of {log.answers} answers of the teacher reached max_new_tokens="
        f"{log.max_new_tokens} and were cut there: what comes later in them, and how they end, is "
        "not learned.",
        advice="Raise --max_new_tokens, or have the context ask for short answers.",
        is_note=True,
    )


def _vanished(log: TrainingLog) -> Finding | None:
    norms = _norms(log)
    if not norms or median(norms) >= VANISHED or _has_recovered(log, 1 - NOTHING_RECOVERED):
        return None
    if (log.prompt_change or 0) > MOVED_FAR:
        return None  # it was there, and the prompt was thrown out of its reach
    zero = sum(norm == 0 for norm in norms)
    return Finding(
        kind="vanishing gradient",
        what=f"The gradient's norm is {median(norms):.2g} in half of the steps, and exactly 0 in "
        f"{zero} of {len(norms)}: nothing reaches the soft prompt.",
        advice="Begin elsewhere (--prompt_tuning_init vocab), at another place (--placement), or "
        "compute in more bits (--dtype float32).",
    )


def _too_high(log: TrainingLog) -> Finding | None:
    last, start, moved = last_loss(log), log.loss_at_start, log.prompt_change
    margin = ROSE if log.loss_at_end is not None else BATCHES_ROSE
    if last is not None and start is not None and last > margin * start:
        what = f"The loss rose from {start:.3g} to {last:.3g}{_so(log)}."
    elif moved is not None and moved > MOVED_FAR and not _has_recovered(log, POOR):
        what = f"The soft prompt has moved by {moved:.3g} times its own length{_so(log)}."
    else:
        return None
    return Finding(
        kind="learning rate too high",
        what=what,
        advice=f"Lower --learning_rate (now {log.learning_rate:g}); --find_lr looks for one.",
    )


def _too_low(log: TrainingLog) -> Finding | None:
    moved = log.prompt_change
    if moved is None or moved >= HARDLY_MOVED * _done(log) or _has_recovered(log, POOR):
        return None
    if _vanished(log):
        return None
    return Finding(
        kind="learning rate too low",
        what=f"The soft prompt has moved by {moved:.2g} times its own length in {len(log.steps)} "
        f"steps, which is next to nothing{_so(log)}.",
        advice=f"Raise --learning_rate (now {log.learning_rate:g}; 1e-2 is usual), or train for "
        "more steps; --find_lr looks for a rate.",
    )


def _clipped(log: TrainingLog) -> Finding | None:
    norms, limit = _norms(log), log.max_grad_norm
    clipped = sum(norm > limit for norm in norms)
    if not norms or limit <= 0 or clipped < ALWAYS * len(norms):
        return None
    return Finding(
        kind="gradient always clipped",
        what=f"The gradient's norm was above max_grad_norm={limit:g} in {clipped} of {len(norms)} "
        f"steps after warm-up, {median(norms):.2g} in half of them{_so(log)}.",
        advice=f"Set --max_grad_norm {2 * median(norms):.1g}, which clips outliers only, or 0 for "
        "none.",
        is_note=_has_recovered(log, POOR),  # AdamW makes up for it
    )


def _not_learning(log: TrainingLog) -> Finding | None:
    share, last, start = recovered(log), last_loss(log), log.loss_at_start
    if share is None or last is None:
        return None
    at_best = recovered(log, last - 2 * _standard_error(log))
    if at_best is None or at_best >= NOTHING_RECOVERED:
        return None
    if log.loss_at_end is None and start and last < FALLING * start:
        return None
    return Finding(
        kind="not learning",
        what=f"{share:.0%} of what the context does is recovered: {_losses(log)}.",
        advice="Give it more tokens (--num_virtual_tokens), more steps (--num_train_epochs), "
        "another start (--prompt_tuning_init) or rate (--find_lr).",
    )


def _overfitted(log: TrainingLog, held_out: float | None) -> Finding | None:
    if held_out is None and log.evaluations:
        held_out = recovered(log, log.evaluations[-1]["loss"])
    share = recovered(log)
    if held_out is None or share is None or share - held_out <= OVERFITTED:
        return None
    return Finding(
        kind="overfitted",
        what=f"{share:.0%} of what the context does is recovered on the training queries, and "
        f"{held_out:.0%} on held-out ones.",
        advice="Train on more and more different queries (--train_file), or for fewer steps "
        "(--num_train_epochs).",
    )


def _norms(log: TrainingLog) -> list[float]:
    """Of the gradients after warm-up."""
    after = (step for step in log.steps if step["step"] > log.warmup_steps)
    return [step["grad_norm"] for step in after if step.get("grad_norm") is not None]


def _has_recovered(log: TrainingLog, least: float) -> bool:
    """Where that is not known, what was won of the loss of the start has to do."""
    share, last, start = recovered(log), last_loss(log), log.loss_at_start
    if share is None and last is not None and start:
        share = 1 - last / start
    return share is not None and share >= least


def _last_losses(log: TrainingLog) -> list[float]:
    return [step["loss"] for step in log.steps[-max(5, len(log.steps) // 5) :]]


def _standard_error(log: TrainingLog) -> float:
    """Of ``last_loss``, as far as it is a mean over batches."""
    losses = _last_losses(log)
    if log.loss_at_end is not None or len(losses) < 2:
        return 0.0
    return stdev(losses) / math.sqrt(len(losses))


def _done(log: TrainingLog) -> float:
    """The part of the run that lies behind."""
    return min(1.0, log.steps[-1]["step"] / log.max_steps) if log.max_steps > 0 else 1.0


def _so(log: TrainingLog) -> str:
    """What came of it, for the end of a sentence."""
    share = recovered(log)
    return "" if share is None else f", with {share:.0%} of what the context does recovered"


def _losses(log: TrainingLog) -> str:
    known = {
        "without the context": log.loss_without_context,
        "at the start": log.loss_at_start,
        "now": last_loss(log),
        "with the context": log.loss_with_context,
    }
    return "loss " + ", ".join(f"{v:.3g} {name}" for name, v in known.items() if v is not None)
