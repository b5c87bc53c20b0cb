"""Answers of a model that reads a soft prompt in the place of its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .model import Collator, SoftPromptModel, TrainingExample
from .prompting import Query
from .teacher import PLAIN_GREEDY, Answer, Teacher


@torch.no_grad()
def generate(
    model: SoftPromptModel,
    tokenizer: Any,
    queries: Sequence[Query],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    show_progress: bool = True,
) -> list[str]:
    """The greedy answer to each query, as text. The queries' contexts are not read.

    Raises ValueError if max_new_tokens or batch_size is less than 1.
    """
    # The rules for answers are the teacher's: which numbers are allowed, which tokens end one.
    ends = Teacher(
        model.base, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size
    ).end_ids
    config = model.prompt.config
    collate = Collator(
        num_virtual_tokens=config.num_virtual_tokens,
        placement=config.placement,
        padding_side="left",
    )
    answers: list[str] = []
    with tqdm(total=len(queries), desc="answers", disable=not show_progress) as progress:
        for start in range(0, len(queries), batch_size):
            part = queries[start : start + batch_size]
            # The last token of an answer is no input: an answer of one token is the query alone.
            batch = collate([TrainingExample(query=q, answer=Answer(ids=[0])) for q in part])
            device = model.prompt.embedding.device
            written = model.base.generate(
                inputs_embeds=model.inputs_embeds(
                    batch["input_ids"].to(device), batch["prompt_mask"].to(device)
                ),
                attention_mask=batch["attention_mask"].to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=ends[0] if ends else 0,
                **PLAIN_GREEDY,
            )
            answers += tokenizer.batch_decode(written, skip_special_tokens=True)
            progress.update(len(part))
    return [answer.strip() for answer in answers]
