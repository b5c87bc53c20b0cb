"""What the teacher's answers depend on: the facts by which a cache of them is known."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..base_model.decoding import PLAIN
from ..base_model.fingerprint import settle, sha256_of_json, tokenizer_facts
from ..base_model.fsdp import whole
from ..base_model.output_head import OutputHead
from ..data.queries import Query
from ..losses.sketch import entries_kept
from .answers import SketchOptions
from .teacher import Teacher

# Raised whenever the same facts lead to other bytes.
FORMAT_VERSION = 3
# Where a model was loaded from, and by what.
NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def teacher_facts(
    teacher: Teacher,
    tokenizer: Any,
    context: str | None,
    *,
    record_hidden: bool = False,
    sketch: SketchOptions | None = None,
) -> dict[str, Any]:
    """JSON values by name. Reads all of the model's weights: a second for each GB or two."""
    model = teacher.model
    head = OutputHead.from_model(model)
    stores = {"answers": True, "hidden": record_hidden, "sketch": sketch is not None}
    return {
        "format_version": FORMAT_VERSION,
        "weights": weights_sha256(model),
        "config": sha256_of_json(
            {k: v for k, v in model.config.to_diff_dict().items() if k not in NOT_OF_THE_MODEL}
        ),
        "dtype": str(model.dtype).removeprefix("torch."),
        **tokenizer_facts(tokenizer),
        "context": None if context is None else sha256_of_json(context),
        "end_ids": list(teacher.end_ids),
        "max_new_tokens": teacher.max_new_tokens,
        "do_sample": teacher.do_sample,
        "teacher_batch_size": teacher.batch_size,
        "teacher_store": "+".join(name for name, stored in stores.items() if stored),
        "teacher_top_k": sketch and entries_kept(sketch.top_k, head.weight.dtype),
        "temperature": None if sketch is None else sketch.temperature,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        # Only where it is set: caches of before it could be set are as good as ever.
        **({} if teacher.sampling == PLAIN else {"sampling": asdict(teacher.sampling)}),
        **({} if teacher.form.dtype == "auto" else {"prefix_dtype": teacher.form.dtype}),
    }


def weights_sha256(model: PreTrainedModel) -> str:
    """Of every byte of what the model would save, with the names, shapes and dtypes.

    Raises ValueError if some of it is not in memory.
    """
    settle(model)
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        for part, tensor in _plain_tensors(name, value):
            if tensor.is_meta:
                raise ValueError(
                    f"a teacher cache needs the whole model in memory, and {part} is offloaded. "
                    "Use no cache, or a machine that holds the model."
                )
            digest.update(f"{part} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _plain_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a quantised one is made of, or itself; nothing of what is no tensor."""
    if not isinstance(value, Tensor):
        return
    value = whole(value)
    if not hasattr(value, "__tensor_flatten__"):
        yield name, value
        return
    names, _ = value.__tensor_flatten__()
    for inner in names:
        yield from _plain_tensors(f"{name}.{inner}", getattr(value, inner))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """As they lie in memory, row by row; no copy of a contiguous tensor on the CPU."""
    values: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(values)


def queries_sha256(queries: Sequence[Query], given: Sequence[list[int] | None]) -> str:
    """Of all that the teacher reads: other token ids are another shard, not a stale one."""
    digest = hashlib.sha256()
    for query, answer in zip(queries, given, strict=True):
        for ids in (query.before, query.context, query.after, answer):
            # The length first, so that no two lists run together; none given is no list at all.
            digest.update(array("q", [-1] if ids is None else [len(ids), *ids]).tobytes())
    return digest.hexdigest()
