"""What training keeps of the teacher: sketches, hidden states, or nothing and it is asked anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..base_model.output_head import OutputHead
from ..losses.sketch import entries_kept
from ..teacher.answers import SketchOptions
from ..utils.errors import OptionError
from .arguments import SoftPromptTrainingArguments

KEPT = {
    "answers": "its answers",
    "sketch": "its answers and sketches of its distributions",
    "hidden": "its answers and hidden states",
    "online": "its answers, and it is asked again at every step",
}


@dataclass(kw_only=True, frozen=True)
class TeacherStore:
    """One of KEPT, and why this one."""

    kind: str
    why: str
    sketch: SketchOptions | None = None

    def __str__(self) -> str:
        entries = "" if self.sketch is None else f", top_k {self.sketch.top_k}"
        return f"Of the teacher is kept: {KEPT[self.kind]}{entries} ({self.why})"

    @property
    def record(self) -> dict[str, Any]:
        """Keyword arguments of ``make_examples``."""
        return {"record_hidden": self.kind == "hidden", "sketch": self.sketch}


def choose_store(
    wanted: str, args: SoftPromptTrainingArguments, *, top_k: int | None, head: OutputHead | None
) -> TeacherStore:
    """top_k: None for the default. head: of the model; None where it is not known yet.

    Raises OptionError if the store that is ``wanted`` is not exact for the objective.
    """
    if not args.needs_teacher_states:
        why = f"objective {args.objective} needs nothing else"
        return TeacherStore(kind="answers", why=why)
    problem = sketch_problem(args, None if head is None else head.softcap)
    if wanted == "sketch" and problem is not None:
        raise OptionError(
            f"teacher_store sketch cannot be used: {problem}. Use --teacher_store=hidden, which "
            "serves every objective and every head"
        )
    why = "as asked for"
    if wanted == "auto":
        wanted, why = ("sketch", "exact for this objective") if not problem else ("hidden", problem)
    if head is not None:
        top_k = entries_kept(top_k, head.weight.dtype)
    options = SketchOptions(top_k=top_k, temperature=args.temperature)
    return TeacherStore(kind=wanted, why=why, sketch=options if wanted == "sketch" else None)


def sketch_problem(args: SoftPromptTrainingArguments, softcap: float | None) -> str | None:
    """Why sketches would not be exact, or None."""
    if args.beta != 0:
        return f"sketches are exact for forward KL alone, and beta is {args.beta:g}"
    if softcap is not None:
        return f"sketches are exact for a linear head, and this model caps its logits at {softcap}"
    if args.loss_impl == "reference":
        return "loss_impl reference materialises the teacher's logits, which needs hidden states"
    return None
