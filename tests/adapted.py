"""Adapted tiny models, and the same arithmetic by hand."""

import torch
from torch import Tensor

from buddy.backbone.adapter import Adapter
from buddy.backbone.load import Backbone
from buddy.engine.model import RoutedLM, geometry_of
from buddy.schema import AdapterSection
from tests.engine.reference import Fickle
from tests.tiny import tiny_backbone, tiny_model

RANK, ALPHA = 4, 6.0
IDS = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(5))
EXECUTED = torch.tensor([3, 4, 6])


def new_adapter(backbone: Backbone, seed: int = 0, first: int = 1, **options) -> Adapter:
    """An adapter that changes nothing yet."""
    return Adapter.new(backbone, AdapterSection(**{"rank": RANK, "alpha": ALPHA, **options}), first=first, seed=seed)


def stirred(adapter: Adapter, size: float = 0.3) -> Adapter:
    """The adapter with factors that change every module, as after training."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in adapter.parts.named_parameters():
            if ".B." in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return adapter


def adapted(family: str = "llama", router: type = Fickle, size: float = 0.3, **options) -> RoutedLM:
    """A routed tiny model with a stirred adapter."""
    backbone = tiny_backbone(family)
    routed = RoutedLM(backbone, router(geometry_of(backbone)), **options)
    routed.adapter = stirred(new_adapter(backbone), size)
    return routed


def by_hand(adapter: Adapter, family: str = "llama"):
    """A stock model with alpha / rank · B A added to its weights."""
    model = tiny_model(family)
    modules = {name.replace(".", "-"): module for name, module in model.named_modules()}
    for name, part in adapter.parts.items():
        modules[name].weight.data += ALPHA / RANK * part["B"].weight.detach() @ part["A"].weight.detach()
    return model


def factors(adapter: Adapter) -> dict[str, Tensor]:
    """Copies of all factors, by name."""
    return {name: parameter.detach().clone() for name, parameter in adapter.parts.named_parameters()}
