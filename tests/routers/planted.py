"""A backbone in which each token needs two of the four routable layers, and its id says which."""

import torch
from torch import Tensor

from buddy.backbone.load import Backbone
from buddy.engine.model import RoutedLM, geometry_of
from buddy.losses import Objective
from buddy.training.estimators import TrainingBatch, Weighted
from tests.tiny import tiny_backbone

FLAG, ROUTABLE, EXECUTED = 0, 4, 4  # the hidden dimension that holds a token's kind; R; K of the best plan


@torch.no_grad()
def planted_backbone() -> Backbone:
    """Six layers: routable layers 0 and 2 add something to tokens of even id only, 1 and 3 to tokens of odd id only.

    A hidden dimension that no layer writes is positive for even ids and negative for odd ones. Attention adds nothing
    in the routable layers, and their MLPs are closed by the sign of that dimension.
    """
    backbone, generator = tiny_backbone("llama"), torch.Generator().manual_seed(0)
    model = backbone.model
    ids = torch.arange(len(model.model.embed_tokens.weight))
    model.model.embed_tokens.weight[:, FLAG] = torch.where(ids % 2 == 0, 20.0, -20.0)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight[FLAG] = 0
        layer.mlp.down_proj.weight[FLAG] = 0
        if not 1 <= index <= ROUTABLE:
            continue
        layer.self_attn.o_proj.weight.zero_()
        sign = 1.0 if index % 2 else -1.0
        for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
            projection.weight.zero_()
            projection.weight[:, FLAG] = sign  # the flag is 7 to 8 once normalised, so silu leaves nothing of −8
        added = 1.5 * torch.randn(64, generator=generator)
        added[FLAG] = 0
        layer.mlp.down_proj.weight.copy_(added[:, None].expand(-1, 128) / (128 * 64))
    model.lm_head.weight.mul_(8)
    model.lm_head.weight[:, FLAG] = 0
    return backbone


def needed(ids: Tensor) -> Tensor:
    """(..., R) bool: the routable layers that tokens (...) need."""
    even = (ids % 2 == 0)[..., None]
    return torch.where(even, torch.tensor([True, False, True, False]), torch.tensor([False, True, False, True]))


def random_ids(rows: int, length: int, seed: int) -> Tensor:
    """(rows, length) long; half of each row is even."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, length, generator=generator).argsort(-1)
    return 2 * torch.randint(2, 129, (rows, length), generator=generator) + order % 2


def trained(router_class: type, steps: int = 100, lr: float = 1.2e-2, **options) -> RoutedLM:
    """The planted backbone with a layerwise router that was trained at K = 4 as `buddy fit` trains it."""
    backbone = planted_backbone()
    routed = RoutedLM(backbone, router_class(geometry_of(backbone), **options))
    groups = [{"params": g["params"], "lr": lr * g["scale"]} for g in routed.router.parameter_groups()]
    optimizer, estimator = torch.optim.AdamW(groups), Weighted(Objective())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    routed.router.train()
    for step in range(steps):
        batch = TrainingBatch(random_ids(4, 16, step + 1), torch.full((4,), EXECUTED), torch.arange(1, 15))
        optimizer.zero_grad()
        estimator(routed, batch, torch.Generator().manual_seed(step)).loss.backward()
        optimizer.step()
        schedule.step()
    routed.router.eval()
    return routed
