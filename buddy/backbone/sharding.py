"""`trainer.strategy=fsdp`: each device holds a part of every decoder layer (FSDP2), and the router whole.

A layer is fetched whole when it is called, by all processes together, whether or not its plan runs it for anybody: so
processes whose windows have other plans never wait for one another in vain. What is not in a layer (embeddings, last
norm, head) is whole on every device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from buddy import distributed
from buddy.backbone.load import Backbone
from buddy.config import Recipe
from buddy.errors import TrainingError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

STRATEGY = "fsdp"


def shards(trainer: Mapping[str, Any]) -> bool:
    """Whether weights are shared out: asked for, and over more than one device."""
    devices, nodes = distributed.shape(trainer)
    return trainer["strategy"] == STRATEGY and devices * nodes > 1


def check(recipe: Recipe) -> None:
    """Raises TrainingError for what does not go with weights that are shared out."""
    if not shards(recipe.trainer):
        return
    if recipe.predictor.name is not None:
        raise TrainingError(
            "A budget predictor is measured by one process alone, which fsdp does not let it be; set "
            "trainer.strategy=ddp or predictor.name=null."
        )
    if recipe.adapter is not None and recipe.adapter.joint:
        raise TrainingError(
            "adapter.joint trains rows at full depth another way than the others, and fsdp needs all processes to do "
            "the same; set adapter.joint=false or trainer.strategy=ddp."
        )


def join(trainer: Mapping[str, Any]) -> None:
    """`distributed.join`, and agree on who holds which part."""
    distributed.join(trainer)
    if shards(trainer):
        _mesh(trainer["accelerator"])


def shard(backbone: Backbone, accelerator: str) -> None:
    """Leave this process's part of every layer on its device; `settle` comes next. Nothing is attached to the backbone.

    Each layer goes to the device whole, one after the other. No process waits for another here.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(accelerator)
    for layer in backbone.layers:
        fully_shard(layer, mesh=mesh)
    backbone.model.to(distributed.device(accelerator))
    within = set(backbone.layers.parameters())
    fully_shard(backbone.base, mesh=mesh, ignored_params={p for p in backbone.base.parameters() if p not in within})


@torch.no_grad()
def settle(backbone: Backbone) -> None:
    """The first call, by all processes: it decides what belongs together, so it is the decoder's, and no layer's."""
    backbone.base(input_ids=torch.zeros(1, 1, dtype=torch.long, device=backbone.device), use_cache=False)


@cache
def _mesh(accelerator: str) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(distributed.device(accelerator).type, (distributed.count(),))
