"""The teacher's work, split over the processes of a run: each answers every nth shard."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..base_model.fsdp import in_lockstep
from ..base_model.output_head import OutputHead
from ..data.queries import Query
from .answers import Answer, SketchOptions, pack, unpack
from .teacher import Teacher


def answer_together(
    teacher: Teacher,
    queries: Sequence[Query],
    given: Sequence[list[int] | None],
    *,
    record_hidden: bool = False,
    sketch: SketchOptions | None = None,
) -> list[Answer]:
    """What ``teacher.answer`` returns, bit for bit, in every process; all have to call it."""
    process, num_processes = PartialState().process_index, PartialState().num_processes
    shards = [range(len(queries))[part] for part in teacher.shards(len(queries))]
    # Only the last shard may be a short one: these queries by themselves have the same shards.
    own = [index for shard in shards[process::num_processes] for index in shard]
    with in_lockstep(teacher.model):
        answers = teacher.answer(
            [queries[index] for index in own],
            [given[index] for index in own],
            record_hidden=record_hidden,
            sketch=sketch,
        )
    if num_processes == 1:
        return answers
    facts = {
        "logit_scale": OutputHead.from_model(teacher.model).logit_scale,
        "temperature": None if sketch is None else sketch.temperature,
    }
    # A shard at a time, so that memory holds no second copy of them all.
    left, together = iter(answers), list[Answer]()
    for number, shard in enumerate(shards):
        owner = number % num_processes
        parcel = [pack([next(left) for _ in shard]) if owner == process else None]
        (tensors,) = broadcast_object_list(parcel, from_process=owner)
        together += unpack(tensors, facts)
    return together
