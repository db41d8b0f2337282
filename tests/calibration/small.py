"""Small probes, and plans for them."""

import torch
from torch import Tensor

from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from tests.engine.reference import Fickle
from tests.tiny import tiny_backbone

WINDOWS = torch.randint(3, 259, (5, 20), generator=torch.Generator().manual_seed(0))
LAYERS = 6


def routed(family: str = "llama", context_layer: int = 1, sinks: int = 1, **config: int) -> RoutedLM:
    """A tiny routed model; nobody asks its router."""
    backbone = tiny_backbone(family, **config)
    return RoutedLM(backbone, Fickle(geometry_of(backbone, context_layer)), sink_tokens=sinks)


def probe(model: RoutedLM | None = None, windows: Tensor = WINDOWS, batch_size: int = 2, **options) -> CalibrationProbe:
    """A probe of five windows in batches of two, two and one."""
    return CalibrationProbe(model or routed(), windows, batch_size, **options)


def plans(count: int, layers: int = LAYERS, context_layer: int = 1, seed: int = 0) -> Tensor:
    """(count, layers) bool, random plans that run the first `context_layer` layers and the last one."""
    runs = torch.rand(count, layers, generator=torch.Generator().manual_seed(seed)) > 0.5
    runs[:, :context_layer] = runs[:, -1] = True
    return runs


def count_calls(model: RoutedLM) -> list[int]:
    """Numbers of the layers, one for each call that sees more than the sinks, noted from now on."""
    called: list[int] = []
    for index, layer in enumerate(model.backbone.layers):
        layer.register_forward_pre_hook(
            lambda _, args, index=index: called.append(index) if args[0].shape[1] > model.sink_tokens else None
        )
    return called
