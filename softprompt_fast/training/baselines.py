"""What a training loss is measured by: the same loss without the context, and with it in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..data.queries import Query, without_context
from ..losses.functional import linear_kl
from ..losses.sketch import TeacherSketch
from ..teacher.examples import TrainingExample
from ..teacher.teacher import Reading, Teacher
from .trainer import SoftPromptTrainer

# Queries that are asked: enough for a mean that is off by some per cent, for the price of a step or
# two.
SAMPLE = 32


class Baselines:
    """The objective's loss on some training queries, for the training log.

    All processes of a run use it together, and get the same numbers.
    """

    def __init__(
        self, trainer: SoftPromptTrainer, teacher: Teacher, examples: Sequence[TrainingExample]
    ) -> None:
        self.trainer = trainer
        self.teacher = teacher
        # Over the whole file, which may go from topic to topic.
        self.examples = list(examples[:: -(-len(examples) // SAMPLE)])

    def measure_start(self) -> None:
        """What is known before the first step. The teacher reads the context once more only where
        nothing that was kept of it will do."""
        log = self.trainer.training_log
        queries = [example.query for example in self.examples]
        kept = self._kept()
        log.loss_with_context = 0.0
        if kept is None or self.trainer.args.objective != "kl":
            itself = kept if isinstance(kept, Tensor) else self._states(queries)
            kept = itself if kept is None else kept
            log.loss_with_context = self._loss(itself, kept)
        nothing = self._states([without_context(query) for query in queries])
        log.context_kl = self._kl(nothing, kept)
        log.loss_without_context = self._loss(nothing, kept)
        log.loss_at_start = self.trainer.mean_loss(self.examples)

    def measure_end(self) -> None:
        """What is known after the last step."""
        log = self.trainer.training_log
        try:
            log.loss_at_end = self.trainer.mean_loss(self.examples)
        except FloatingPointError:
            log.not_finite_step = self.trainer.state.global_step

    def _kept(self) -> Tensor | TeacherSketch | None:
        """What the examples hold of the teacher, in the order of their tokens."""
        answers = [example.answer for example in self.examples]
        if answers[0].hidden is not None:
            return torch.cat([cast(Tensor, answer.hidden) for answer in answers])
        if answers[0].sketch is not None:
            return TeacherSketch.cat([cast(TeacherSketch, answer.sketch) for answer in answers])
        return None

    def _states(self, queries: Sequence[Query]) -> Tensor:
        """Hidden states [T, D] of the frozen model that is asked these queries."""
        answers = self.teacher.answer(
            queries,
            [example.answer.ids for example in self.examples],
            record_hidden=True,
            reading=Reading(self.teacher.model),
        )
        return torch.cat([cast(Tensor, answer.hidden) for answer in answers])

    @torch.no_grad()
    def _kl(self, hidden: Tensor, teacher: Tensor | TeacherSketch) -> float:
        args, head = self.trainer.args, self.trainer.model.head
        device = head.weight.device
        options: dict[str, Any] = {"backend": args.backend, "workspace_mib": args.workspace_mib}
        options |= {"temperature": args.temperature, **head.loss_options()}
        return linear_kl(hidden.to(device), head.weight, teacher.to(device), **options).item()

    @torch.no_grad()
    def _loss(self, hidden: Tensor, teacher: Tensor | TeacherSketch) -> float:
        device = self.trainer.model.head.weight.device
        targets = torch.tensor([i for example in self.examples for i in example.answer.ids])
        total = self.trainer.summed_objective(
            hidden.to(device), targets.to(device), teacher.to(device)
        )
        return total.item() / len(targets)
