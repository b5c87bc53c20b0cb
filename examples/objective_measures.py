"""What a soft prompt keeps of its teacher, and how far its vectors are from the context's.

Legend: T answer tokens, V vocabulary, C tokens of the context, D hidden width; log_p the teacher's
distribution (with the context in place), log_q the student's (with the soft prompt).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import TrainerCallback

from softprompt_fast.evaluation.metrics import entropy, spearman
from softprompt_fast.student.model import SoftPromptModel
from softprompt_fast.teacher.examples import TrainingExample

WRONG_ANSWERS = 20


class Judge:
    """Compares a student with its teacher at the T positions that predict the held-out answers."""

    def __init__(
        self,
        student: SoftPromptModel,
        examples: Sequence[TrainingExample],
        *,
        right: int,
        wrong: int,
    ) -> None:
        """examples: with the teacher's hidden states. right, wrong: the tokens to be followed."""
        self.student, self.examples = student, examples
        self.right, self.wrong = right, wrong
        ids = torch.tensor([token for example in examples for token in example.answer.ids])
        self.decisive = (ids == right).nonzero()[:, 0]
        """The positions that predict the right token."""
        hidden = torch.cat([example.answer.hidden for example in examples])
        self.log_p = student.head.logits(hidden).log_softmax(-1)
        """[T, V]."""
        self.context = student.base.get_input_embeddings().weight[examples[0].query.context]
        """The context's own vectors, [C, D]."""

    @torch.no_grad()
    def log_q(self) -> Tensor:
        """[T, V], of the student as it is now."""
        batch = self.student.collator()(self.examples)
        names = ("input_ids", "prompt_mask", "attention_mask", "position_ids", "labels")
        hidden = self.student(**{name: batch[name] for name in names})
        return self.student.head.logits(hidden).log_softmax(-1)

    def figures(self, log_q: Tensor) -> dict[str, float]:
        """KL and entropy over all answer tokens; the others at the decisive token."""
        at_p, at_q = self.log_p[self.decisive], log_q[self.decisive]
        right, wrong = (float(at_q[:, token].exp().mean()) for token in (self.right, self.wrong))
        return {
            "kl": divergence(self.log_p, log_q),
            "entropy": float(entropy(log_q).mean()),
            "ranking": ranking(at_p, at_q, self.right),
            "right": right,
            "wrong": wrong,
            "place": 1 + float((at_q > at_q[:, [self.wrong]]).sum(-1).double().mean()),
        }

    def distance(self) -> float:
        """From a virtual token to the nearest token of the context, in lengths of such a token."""
        prompt = self.student.prompt.embedding.detach()
        # The default takes differences of squares, and finds a distance between equals.
        apart = torch.cdist(prompt, self.context, compute_mode="donot_use_mm_for_euclid_dist")
        return float(apart.amin(dim=1).mean() / self.context.norm(dim=1).mean())


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats, mean over rows."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def ranking(log_p: Tensor, log_q: Tensor, right: int) -> float:
    """Spearman's rank correlation over the teacher's most probable wrong tokens, mean over rows.

    1: the student ranks them as the teacher does, 0: as if by chance.
    """
    wrong = log_p.index_fill(-1, torch.tensor([right]), -torch.inf)
    return float(spearman(wrong, log_q, top=WRONG_ANSWERS).mean())


class Watch(TrainerCallback):
    """Held-out KL and distance from the context, before the first step and after each ``every``."""

    def __init__(self, judge: Judge, *, every: int) -> None:
        self.judge, self.every = judge, every
        self.path: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._look(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self._look(state.global_step)

    def _look(self, step: int) -> None:
        kl = divergence(self.judge.log_p, self.judge.log_q())
        self.path.append({"step": step, "kl": kl, "distance": self.judge.distance()})
