"""A frozen base whose layers are split over the processes (FSDP2).

Each process holds its part of every layer, and has the whole layer only while it computes with it.
The embeddings, the head and what else lies outside of the layers stay whole in every process: the
losses read the head where it is, and the soft prompt is an ordinary parameter beside it all.

A forward call of such a base is one of all processes: each must make it, on whatever it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from .output_head import decoder


def shard_base(base: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Keep this process's part of each layer, and the rest of ``base``, on ``device``.

    In place. Raises ValueError if ``base`` does not say what its layers are.
    """
    body, kinds = decoder(base), set(base._no_split_modules or ())
    layers, inside = [], set[nn.Module]()
    for module in body.modules():
        if type(module).__name__ in kinds and module not in inside:
            layers.append(module)
            inside.update(module.modules())
    if not layers:
        raise ValueError(
            f"shard_base: {type(base).__name__} does not say what its layers are "
            "(_no_split_modules). Leave it out."
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    # Without parameters of its own: it tells the layers what comes after them.
    outside = set(body.parameters()) - {p for layer in layers for p in layer.parameters()}
    fully_shard(body, mesh=mesh, ignored_params=outside)
    return base.to(device)  # type: ignore[arg-type]


def is_sharded(base: PreTrainedModel) -> bool:
    return isinstance(decoder(base), FSDPModule)


def sharded_parameters(module: nn.Module) -> list[str]:
    """Their names."""
    return [name for name, value in module.named_parameters() if hasattr(value, "full_tensor")]


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process may hold a part; then all processes must ask for it."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@contextmanager
def in_lockstep(base: PreTrainedModel) -> Iterator[None]:
    """Entered by all processes together; each may call ``base`` as often as it has to.

    Before each call the processes count who makes one of its own. Who leaves the block joins the
    calls of the others, on a token that nobody asked for, until nobody makes any more.
    """
    if not is_sharded(base):
        yield
        return
    body = decoder(base)

    def announce(*_: Any) -> None:
        _count(base, 1)

    hook = body.register_forward_pre_hook(announce)
    try:
        yield
    finally:
        hook.remove()
    while int(_count(base, 0)):
        with torch.no_grad():
            body(input_ids=torch.zeros(1, 1, dtype=torch.long, device=base.device), use_cache=False)


def any_process_has(left: Sequence[Any], base: PreTrainedModel) -> bool:
    """Of the processes that are in lockstep: this one alone, unless ``base`` is sharded."""
    return bool(_count(base, len(left)) if is_sharded(base) else left)


def _count(base: PreTrainedModel, own: int) -> Tensor:
    total = torch.tensor(own, device=base.device)
    dist.all_reduce(total)
    return total
