"""`trainer.strategy=fsdp`: each device holds a shard of every decoder layer (FSDP2), and the whole router.

All processes gather a layer together when it is called, whether or not their plans run it, so processes with different
plans never deadlock. Everything outside the layers (embeddings, last norm, head) is replicated on every device.
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
    """Whether weights are sharded: the recipe asks for it, and for more than one device."""
    devices, nodes = distributed.device_counts(trainer)
    return trainer["strategy"] == STRATEGY and devices * nodes > 1


def check_sharding(recipe: Recipe) -> None:
    """Raises TrainingError for parts of a recipe that do not work with sharded weights."""
    if not is_sharded(recipe.trainer):
        return
    if recipe.predictor.name is not None:
        raise TrainingError(
            "A budget predictor is fitted by one process alone, which fsdp does not allow; set trainer.strategy=ddp or "
            "predictor.name=null."
        )
    if recipe.adapter is not None and recipe.adapter.joint:
        raise TrainingError(
            "adapter.joint runs rows at full depth without the router, and fsdp needs all processes to run the same; "
            "set adapter.joint=false or trainer.strategy=ddp."
        )


def join(trainer: Mapping[str, Any]) -> None:
    """`distributed.launch`, and the device mesh of the shards."""
    distributed.launch(trainer)
    if is_sharded(trainer):
        _mesh(trainer["accelerator"])


def shard(backbone: Backbone, accelerator: str) -> None:
    """Keep only this process's shard of every layer, on its device; call `finish_sharding` next.

    Nothing may be attached to the backbone. Each layer goes to the device whole, one after the other. No process waits
    for another here.
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
    """The first forward, by all processes: FSDP takes the module that is called first for its root, the decoder."""
    backbone.base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=backbone.device), use_cache=False)


@cache
def _mesh(accelerator: str) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(distributed.device(accelerator).type, (distributed.world_size(),))
