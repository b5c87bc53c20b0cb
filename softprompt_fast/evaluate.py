"""How well a soft prompt stands in for its context, on queries that it was not trained on.

The teacher (the model with the full context) answers each query. Each condition then predicts the
tokens of that answer, and is compared with the teacher's own predictions, token by token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .data import Record
from .examples import make_examples
from .generate import generate
from .head import OutputHead
from .losses import linear_kl, linear_nll
from .model import SoftPromptModel, TrainingExample
from .prompting import Query, cut_context
from .soft_prompt import SoftPrompt
from .teacher import Teacher

FULL, NONE, CUT, SOFT = "full context", "no context", "cut context", "soft prompt"
CONDITIONS = (FULL, NONE, CUT, SOFT)
LOGIT_ROWS = 256  # rows of logits that the top-1 comparison holds at a time


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: SoftPrompt,
    records: Sequence[Record],
    context: str | None,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    num_samples: int = 4,
    show_progress: bool = True,
    backend: str = "auto",
    workspace_mib: float = 256,
) -> dict[str, Any]:
    """A report of JSON values; ``report["conditions"]`` holds one row for each of CONDITIONS.

    kl: mean of KL(full context || condition) over all answer tokens, in nats.
    kl_standard_error: of that mean, over queries; tokens of one answer are not independent.
    top1_agreement: how often both think the same token most probable.
    perplexity: of the answer. kl_recovered: 1 - kl / kl of "no context".
    ``report["answers"]``: what each condition itself answers to the first ``num_samples`` queries.

    Raises ValueError if the prompt is another model's, there are no records, or the model has too
    few positions.
    """
    if not records:
        raise ValueError("evaluation needs at least one query")
    started = time.perf_counter()
    teacher = Teacher(
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        show_progress=show_progress,
    )
    student = SoftPromptModel(model, prompt)
    examples = make_examples(teacher, tokenizer, records, context, record_hidden=True)
    for example in examples:
        student.check_length(example.query, len(example.answer.ids))
    answers = _answers(teacher, student, tokenizer, records, examples, num_samples)
    hidden = _hidden_states(teacher, student, examples)
    lengths = torch.tensor([len(example.answer.ids) for example in examples])
    targets = torch.tensor([token for example in examples for token in example.answer.ids])
    options = {"backend": backend, "workspace_mib": workspace_mib, "reduction": "none"}
    top1 = _most_probable(student.head, hidden[FULL])
    rows = {
        name: _row(student.head, hidden[name], hidden[FULL], top1, targets, lengths, options)
        for name in CONDITIONS
    }
    without = rows[NONE]["kl"]
    for row in rows.values():
        row["kl_recovered"] = 1 - row["kl"] / without if without > 0 else None
    P = prompt.config.num_virtual_tokens
    return {
        "model": model.config._name_or_path,
        "num_virtual_tokens": P,
        "placement": prompt.config.placement,
        "context_tokens": max(len(example.query.context) for example in examples),
        "queries": len(examples),
        "answer_tokens": len(targets),
        "max_new_tokens": max_new_tokens,
        "standard_error": "over queries: the tokens of one answer count as one cluster",
        "conditions": rows,
        "kl_recovered": rows[SOFT]["kl_recovered"],
        "answers": answers,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def _other_queries(student: SoftPromptModel, queries: Sequence[Query]) -> dict[str, list[Query]]:
    """The queries as the conditions without a soft prompt ask them."""
    P = student.prompt.config.num_virtual_tokens
    return {
        NONE: [replace(query, before=[], context=[], after=query.plain) for query in queries],
        CUT: [cut_context(query, P) for query in queries],
    }


def _hidden_states(
    teacher: Teacher, student: SoftPromptModel, examples: Sequence[TrainingExample]
) -> dict[str, Tensor]:
    """[T, D] for each condition, at the positions that predict the T tokens of all answers."""
    ids = [example.answer.ids for example in examples]
    hidden: dict[str, list[Any]] = {FULL: [example.answer.hidden for example in examples]}
    for name, queries in _other_queries(student, [e.query for e in examples]).items():
        answers = teacher.answer(queries, ids, record_hidden=True)
        hidden[name] = [answer.hidden for answer in answers]
    hidden[SOFT] = _prompt_states(teacher, student, examples)
    return {name: torch.cat(parts) for name, parts in hidden.items()}


@torch.no_grad()
def _prompt_states(
    teacher: Teacher, student: SoftPromptModel, examples: Sequence[TrainingExample]
) -> list[Tensor]:
    collate = student.collator()
    device = student.prompt.embedding.device
    parts = []
    starts = range(0, len(examples), teacher.batch_size)
    for start in tqdm(starts, desc="soft prompt states", disable=not teacher.show_progress):
        batch = collate(examples[start : start + teacher.batch_size])
        inputs = {
            name: batch[name].to(device)
            for name in ("input_ids", "prompt_mask", "attention_mask", "position_ids", "labels")
        }
        parts.append(student(**inputs).cpu())
    return parts


@torch.no_grad()
def _row(
    head: OutputHead,
    hidden: Tensor,
    teacher_hidden: Tensor,
    teacher_top1: Tensor,
    targets: Tensor,
    lengths: Tensor,
    options: dict[str, Any],
) -> dict[str, Any]:
    """One line of the table.

    hidden, teacher_hidden: [T, D]; teacher_top1, targets: [T]; lengths: one a query.
    """
    device = head.weight.device
    hidden, teacher_hidden = hidden.to(device), teacher_hidden.to(device)
    options = {**options, **head.loss_options()}
    kl = linear_kl(hidden, head.weight, teacher_hidden, **options).double().cpu()
    nll = linear_nll(hidden, head.weight, targets.to(device), **options).double().cpu()
    agree = _most_probable(head, hidden) == teacher_top1
    return {
        "kl": kl.mean().item(),
        "kl_standard_error": clustered_standard_error(kl, lengths),
        "top1_agreement": agree.double().mean().item(),
        "perplexity": nll.mean().exp().item(),
    }


@torch.no_grad()
def _most_probable(head: OutputHead, hidden: Tensor) -> Tensor:
    """The most probable token at each position, [T] on the CPU.    hidden: [T, D]"""
    parts = hidden.to(head.weight.device).split(LOGIT_ROWS)
    return torch.cat([head.logits(part).argmax(-1) for part in parts]).cpu()


def clustered_standard_error(values: Tensor, lengths: Tensor) -> float | None:
    """Of the mean of ``values`` [T], whose first lengths[0] entries belong together, and so on.

    The ratio estimator of survey sampling (Cochran, Sampling Techniques, 1977, section 2.11);
    None for one cluster.
    """
    clusters = len(lengths)
    if clusters < 2:
        return None
    sums = torch.stack([part.sum() for part in values.split(lengths.tolist())])
    residuals = sums - values.mean() * lengths
    variance = residuals.square().sum() * clusters / (clusters - 1)
    return math.sqrt(variance.item()) / len(values)


def _answers(
    teacher: Teacher,
    student: SoftPromptModel,
    tokenizer: Any,
    records: Sequence[Record],
    examples: Sequence[TrainingExample],
    num_samples: int,
) -> list[dict[str, str]]:
    """What each condition answers by itself, as text."""
    queries = [example.query for example in examples[:num_samples]]
    if not queries:
        return []

    def decode(answers) -> list[str]:
        ids = [answer.ids for answer in answers]
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    # An answer of the data is not the teacher's: then it has to write its own.
    known = [
        example.answer.ids if record.completion is None else None
        for example, record in zip(examples, records, strict=True)
    ]
    texts = {FULL: decode(teacher.answer(queries, known[:num_samples], record_hidden=False))}
    for name, others in _other_queries(student, queries).items():
        texts[name] = decode(teacher.answer(others, record_hidden=False))
    texts[SOFT] = generate(
        student,
        tokenizer,
        queries,
        max_new_tokens=teacher.max_new_tokens,
        batch_size=teacher.batch_size,
        show_progress=teacher.show_progress,
    )
    return [
        {"query": record.messages[-1]["content"], **{name: texts[name][i] for name in CONDITIONS}}
        for i, record in enumerate(records[: len(queries)])
    ]
