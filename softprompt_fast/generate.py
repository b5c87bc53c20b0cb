"""Answers of a model that reads a soft prompt in the place of its context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .decoding import in_batches, write
from .model import SoftPromptModel, TrainingExample
from .prefix_cache import Prefix
from .prompting import Query, student_layout
from .teacher import Answer, Teacher


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

    Raises ValueError if max_new_tokens or batch_size is less than 1, or if the prompt, a query and
    its answer do not fit into the model's positions.
    """
    for query in queries:
        model.check_length(query, max_new_tokens)
    # The rules for answers are the teacher's: which numbers are allowed, which tokens end one.
    ends = Teacher(
        model.base, tokenizer, max_new_tokens=max_new_tokens, batch_size=batch_size
    ).end_ids
    collate = model.collator(padding_side="left")
    device = model.prompt.embedding.device

    def length(index: int) -> int:
        return sum(map(len, student_layout(queries[index], collate.placement)))

    may_pad = Prefix.read(model.base, []).bears_padding
    texts: dict[int, str] = {}
    with tqdm(total=len(queries), desc="answers", disable=not show_progress) as progress:
        for part in in_batches(range(len(queries)), batch_size, length=length, may_pad=may_pad):
            # The last token of an answer is no input: an answer of one token is the query alone.
            answer = Answer(ids=[0])
            batch = collate([TrainingExample(query=queries[i], answer=answer) for i in part])
            ids, mask, prompt_mask = (
                batch[name].to(device) for name in ("input_ids", "attention_mask", "prompt_mask")
            )
            written = write(
                model.base,
                ids,
                mask,
                max_new_tokens=max_new_tokens,
                end_ids=ends,
                embeds=model.inputs_embeds(ids, prompt_mask),
            )
            decoded = tokenizer.batch_decode(written, skip_special_tokens=True)
            texts.update(zip(part, decoded, strict=True))
            progress.update(len(part))
    return [texts[index].strip() for index in range(len(queries))]
