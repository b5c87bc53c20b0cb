"""How well a soft prompt stands in for its context, on queries that it was not trained on.

The teacher (the model with the full context) answers each query. Each condition then predicts the
tokens of that answer, and is compared with the teacher's own predictions, token by token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.queries import Query, cut_context, text_ids, without_context
from ..data.records import Record
from ..student.generation import generate
from ..student.model import SoftPromptModel
from ..student.soft_prompt import SoftPrompt
from ..teacher.answers import Answer
from ..teacher.examples import make_examples
from ..teacher.teacher import Teacher
from ..utils.text import answer_text, pieces
from .baselines import (
    CONDITIONS,
    CUT,
    FULL,
    NONE,
    PRUNED,
    RETRIEVED,
    SOFT,
    Rankings,
    with_pruned_context,
    with_retrieved_chunk,
)
from .metrics import QUANTILES, Tokens, series, summary, token_metrics, tokens_by_position
from .nearest_tokens import nearest_tokens


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: SoftPrompt,
    records: Sequence[Record],
    context: str | None,
    *,
    num_samples: int = 4,
    **options: Any,
) -> dict[str, Any]:
    """The report of one prompt. options: those of ``Evaluation``."""
    evaluation = Evaluation(model, tokenizer, records, context, **options)
    return evaluation.report(prompt, num_samples=num_samples)


class Evaluation:
    """Held-out queries and the teacher's answers to them; any number of prompts are judged by it.

    What does not depend on the prompt is computed once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        records: Sequence[Record],
        context: str | None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 8,
        show_progress: bool = True,
        backend: str = "auto",
        workspace_mib: float = 256,
        **of_teacher: Any,
    ) -> None:
        """of_teacher: further options of ``Teacher``.

        Raises ValueError if there are no records, or the model has too few positions."""
        if not records:
            raise ValueError("evaluation needs at least one query")
        self.started = time.perf_counter()
        self.model, self.tokenizer, self.records = model, tokenizer, records
        self.backend, self.workspace_mib = backend, workspace_mib
        self.teacher = Teacher(
            model,
            tokenizer,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            show_progress=show_progress,
            **of_teacher,
        )
        self.examples = make_examples(self.teacher, tokenizer, records, context, record_hidden=True)
        self.queries = [example.query for example in self.examples]
        self.answers = [example.answer.ids for example in self.examples]
        self.lengths = [len(ids) for ids in self.answers]
        contexts = {record.context_or(context) for record in records}
        self.context_tokens = max(len(text_ids(tokenizer, text)) for text in contexts)
        self._retrieved = with_retrieved_chunk(tokenizer, records, context)
        self._states: dict[tuple[str, int], Tensor] = {}
        self._rankings: Rankings = {}

    def report(self, prompt: SoftPrompt, *, num_samples: int = 4) -> dict[str, Any]:
        """JSON values; ``report["conditions"]`` holds one row for each of CONDITIONS.

        A row is ``metrics.summary`` and kl_recovered, 1 - kl / kl of "no context".
        ``report["series"]``: ``metrics.series`` of each condition, for pictures.
        ``report["answers"]``: what each condition itself answers to the first ``num_samples``
        queries, and the KL of each at every token of the teacher's answer.
        ``report["nearest_tokens"]``: of each vector of the prompt.

        Raises ValueError if the prompt is another model's, or does not fit before an answer.
        """
        student = SoftPromptModel(self.model, prompt)
        for query, length in zip(self.queries, self.lengths, strict=True):
            student.check_length(query, length)
        P = prompt.config.num_virtual_tokens
        answers = self._answers(student, num_samples) if num_samples else []
        tokens = self._token_metrics(student)
        rows = {name: summary(tokens[name], self.lengths) for name in CONDITIONS}
        without = rows[NONE]["kl"]
        for row in rows.values():
            row["kl_recovered"] = 1 - row["kl"] / without if without > 0 else None
        for index, answer in enumerate(answers):
            answer["tokens"] = self._coloured(index, tokens)
        return {
            "model": self.model.config._name_or_path,
            "num_virtual_tokens": P,
            "placement": prompt.config.placement,
            "context_tokens": self.context_tokens,
            "excerpt_tokens": max(len(query.context) for query in self.queries),
            "queries": len(self.queries),
            "answer_tokens": sum(self.lengths),
            "max_new_tokens": self.teacher.max_new_tokens,
            "standard_error": "over queries: the tokens of one answer count as one cluster",
            "conditions": rows,
            "kl_recovered": rows[SOFT]["kl_recovered"],
            "tokens_by_position": tokens_by_position(self.lengths),
            "quantiles": list(QUANTILES),
            "series": {name: series(tokens[name], self.lengths) for name in CONDITIONS},
            "answers": answers,
            "nearest_tokens": nearest_tokens(self.model, self.tokenizer, prompt.embedding),
            "seconds": round(time.perf_counter() - self.started, 1),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def _asked(self, num_queries: int, num_tokens: int) -> dict[str, list[Query]]:
        """The first queries as the conditions without virtual tokens ask them."""
        queries = self.queries[:num_queries]
        return {
            NONE: [without_context(query) for query in queries],
            CUT: [cut_context(query, num_tokens) for query in queries],
            PRUNED: with_pruned_context(self.model, queries, num_tokens, self._rankings),
            RETRIEVED: self._retrieved[:num_queries],
        }

    def _token_metrics(self, student: SoftPromptModel) -> dict[str, Tokens]:
        """Of each condition, at the positions that predict the tokens of all answers."""
        full = _all_states([example.answer for example in self.examples])
        hidden = {FULL: full, SOFT: self._prompt_states(student)}
        P = student.prompt.config.num_virtual_tokens
        for name, queries in self._asked(len(self.queries), P).items():
            key = (name, P if name in (CUT, PRUNED) else 0)
            if key not in self._states:
                read = self.teacher.answer(queries, self.answers, record_hidden=True)
                self._states[key] = _all_states(read)
            hidden[name] = self._states[key]
        return token_metrics(
            student.head,
            hidden,
            full,
            torch.tensor([token for ids in self.answers for token in ids]),
            backend=self.backend,
            workspace_mib=self.workspace_mib,
        )

    @torch.no_grad()
    def _prompt_states(self, student: SoftPromptModel) -> Tensor:
        """Hidden states [T, D] of the model with the soft prompt."""
        collate = student.collator()
        device = student.prompt.embedding.device
        size = self.teacher.batch_size
        parts = []
        starts = range(0, len(self.examples), size)
        for start in tqdm(
            starts, desc="soft prompt states", disable=not self.teacher.show_progress
        ):
            batch = collate(self.examples[start : start + size])
            inputs = {
                name: batch[name].to(device)
                for name in ("input_ids", "prompt_mask", "attention_mask", "position_ids", "labels")
            }
            parts.append(student(**inputs).cpu())
        return torch.cat(parts)

    def _answers(self, student: SoftPromptModel, num_samples: int) -> list[dict[str, Any]]:
        """What each condition answers by itself, as text."""
        queries, records = self.queries[:num_samples], self.records[:num_samples]

        def decode(answers) -> list[str]:
            return [answer_text(self.tokenizer, answer.ids) for answer in answers]

        # An answer of the data is not the teacher's: then it has to write its own.
        known = [
            ids if record.completion is None else None
            for ids, record in zip(self.answers, records, strict=False)
        ]
        texts = {FULL: decode(self.teacher.answer(queries, known))}
        for name, others in self._asked(
            num_samples, student.prompt.config.num_virtual_tokens
        ).items():
            texts[name] = decode(self.teacher.answer(others))
        texts[SOFT] = generate(
            student,
            self.tokenizer,
            queries,
            max_new_tokens=self.teacher.max_new_tokens,
            batch_size=self.teacher.batch_size,
            show_progress=self.teacher.show_progress,
        )
        return [
            {
                "query": record.messages[-1]["content"],
                **{name: texts[name][index] for name in CONDITIONS},
            }
            for index, record in enumerate(records)
        ]

    def _coloured(self, index: int, tokens: dict[str, Tokens]) -> list[dict[str, Any]]:
        """The tokens of one answer of the teacher, with the KL of each condition."""
        start = sum(self.lengths[:index])
        return [
            {
                "text": text,
                "kl": {name: tokens[name]["kl"][start + place].item() for name in CONDITIONS},
            }
            for place, text in enumerate(pieces(self.tokenizer, self.answers[index]))
        ]


def _all_states(answers: Sequence[Answer]) -> Tensor:
    """[T, D]"""
    return torch.cat([cast(Tensor, answer.hidden) for answer in answers])
