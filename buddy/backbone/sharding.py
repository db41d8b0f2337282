"""`trainer.strategy=fsdp`: each device holds a shard of every decoder layer (FSDP2), and the whole router.

All processes gather each layer that is called, whether or not their plans run it, so processes with different plans
never deadlock. Embeddings, last norm and head are replicated on every device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from buddy import distributed
from buddy.backbone.load import Backbone
from buddy.errors import TrainingError
from buddy.schema import Recipe

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STRATEGY = "fsdp"


def is_sharded(trainer: Mapping[str, Any]) -> bool:
    """Whether weights are sharded: with strategy fsdp and more than one device."""
    devices, nodes = distributed.device_counts(trainer)
    return trainer["strategy"] == STRATEGY and devices * nodes > 1


def check_sharding(recipe: Recipe) -> None:
    """Raises TrainingError for recipe keys that do not work with sharded weights."""
    if not is_sharded(recipe.trainer):
        return
    if recipe.predictor.name is not None:
        raise TrainingError(
            "Only one process fits a budget predictor, which fsdp does not allow; set trainer.strategy=ddp or "
            "predictor.name=null."
        )
    if recipe.adapter is not None and recipe.adapter.joint:
        raise TrainingError(
            "adapter.joint runs some rows without the router, and fsdp needs the same calls in all processes; "
            "set adapter.joint=false or trainer.strategy=ddp."
        )


def join(trainer: Mapping[str, Any]) -> None:
    """`distributed.launch`, and create the device mesh of the shards."""
    distributed.launch(trainer)
    if is_sharded(trainer):
        _mesh(trainer["accelerator"])


def shard(backbone: Backbone, accelerator: str) -> None:
    """Keep only this process's shard of every layer, on its device; call `finish_sharding` next.

    The backbone must be without a router or adapter. The layers are moved to the device one after the other. No process
    waits for another here.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(accelerator)
    for layer in backbone.layers:
        fully_shard(layer, mesh=mesh)
    backbone.model.to(distributed.device(accelerator))
    within = set(backbone.layers.parameters())
    fully_shard(backbone.base, mesh=mesh, ignored_params={p for p in backbone.base.parameters() if p not in within})


@torch.no_grad()
def finish_sharding(backbone: Backbone) -> None:
    """The first forward, in all processes: FSDP's root is the module that is called first, here the decoder."""
    backbone.base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=backbone.device), use_cache=False)


@cache
def _mesh(accelerator: str) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(distributed.device(accelerator).type, (torch.distributed.get_world_size(),))
