"""Several processes train as one would: each step's examples are split, none is read twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, Sampler

from ..student.collator import IGNORE
from ..teacher.examples import TrainingExample
from .arguments import SoftPromptTrainingArguments

Collate = Callable[[Any], dict[str, Any]]


def shared_loader(
    dataset: Dataset[TrainingExample],
    sampler: Sampler[int] | None,
    collate: Collate,
    args: SoftPromptTrainingArguments,
    accelerator: Accelerator,
) -> DataLoader[Any]:
    """The batches of all processes, of which each collates its share.

    Every process draws the same order, as if it were the only one. Accelerate's own sharding fills
    the last batch of an epoch up with examples that were read before, which would count twice.
    """
    loader = DataLoader(
        dataset,
        batch_size=args.train_batch_size * args.world_size,
        sampler=sampler,
        collate_fn=partial(own_share, collate, args.process_index, args.world_size),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        drop_last=args.dataloader_drop_last,
    )
    return prepare_data_loader(
        loader,
        args.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=accelerator.rng_types,
        use_seedable_sampler=True,
        data_seed=args.data_seed,
    )


def own_share(
    collate: Collate, process: int, num_processes: int, examples: Sequence[TrainingExample]
) -> dict[str, Any]:
    """The batch of one process, out of the examples of all.

    Where there are fewer examples than processes, the others read one whose tokens count nothing:
    the gradients of all processes are added up, so each must have one.
    """
    if own := examples[process::num_processes]:
        return collate(own)
    batch = collate(examples[:1])
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    for name in ("teacher_hidden", "teacher_sketch", "examples"):
        if name in batch:
            batch[name] = batch[name][:0]
    return batch
