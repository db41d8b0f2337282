"""Shortened LLaMA's criteria by brute force, and what the plus of Taylor+ protects."""

import pytest
import torch
from torch.nn import functional as F

from buddy import Geometry
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import RegistryError
from buddy.registry import build
from routers.shortened_llama import ShortenedLlama
from tests.routers.landscape import Landscape, left_out
from tests.routers.uneven import WINDOWS, BruteForce, uneven_backbone

SIZES = Geometry(layers=12, context_layer=1, hidden=8, features=4)


def order(router: ShortenedLlama) -> list[int]:
    """Layers in the order in which they go as the budget falls."""
    gone: list[int] = []
    for k in range(11, 1, -1):
        (new,) = left_out(router, k) - {*gone}
        gone.append(new)
    return gone


def calibrated(seed: int, **options) -> ShortenedLlama:
    backbone = uneven_backbone(seed)
    router = ShortenedLlama(geometry_of(backbone), **options)
    router.calibrate(CalibrationProbe(RoutedLM(backbone, router), WINDOWS, 2))
    return router


@pytest.mark.parametrize("seed", [0, 1])
def test_by_perplexity_the_least_missed_layer_goes_first(seed):
    brute = BruteForce(seed)
    assert order(calibrated(seed)) == sorted(range(10), key=lambda layer: brute.ce([layer]))


@pytest.mark.parametrize("seed", [0, 1])
def test_by_taylor_the_layer_of_least_weight_times_gradient_goes_first(seed):
    model = uneven_backbone(seed).model.requires_grad_(True)
    F.cross_entropy(model(WINDOWS).logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()
    importance = [
        sum((p * p.grad).abs().sum().item() for name, p in layer.named_parameters() if name.endswith("proj.weight"))
        for layer in model.model.layers
    ]
    plain = sorted(range(10), key=lambda layer: importance[1 + layer])
    assert order(calibrated(seed, criterion="taylor", protect=[0, 0])) == plain
    protected = [0, 1, 2, 9]  # layers 1, 2, 3 of the first four and 10 of the last two
    unprotected = [layer for layer in plain if layer not in protected]
    plus = unprotected + [layer for layer in plain if layer in protected]
    assert order(calibrated(seed, criterion="taylor")) == plus != plain


def with_importance(importance: list[float], geometry: Geometry = SIZES, **options) -> ShortenedLlama:
    probe, router = Landscape(geometry, lambda removed: 0.0, []), ShortenedLlama(geometry, **options)
    probe.taylor = probe.loss_increase = torch.tensor(importance)
    router.calibrate(probe)
    return router


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({}, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ({"criterion": "taylor"}, [8, 7, 6, 5, 4, 3, 9, 2, 1, 0]),
        ({"protect": [2, 3]}, [7, 6, 5, 4, 3, 2, 1, 9, 8, 0]),
        ({"protect": [99, 0]}, [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
    ],
)
def test_protected_layers_go_last(options, last):
    assert order(with_importance([float(10 - layer) for layer in range(10)], **options)) == last


def test_protection_counts_layers_of_the_backbone():
    sizes = Geometry(layers=12, context_layer=3, hidden=8, features=4)
    router = with_importance([0.0] * 8, sizes, criterion="taylor")
    assert {layer for layer, held in enumerate(router.protected) if held} == {0, 7}  # layers 3 and 10


def test_of_equal_layers_the_lower_stays():
    assert order(with_importance([1.0] * 10)) == list(range(9, -1, -1))


def test_huge_perplexities_keep_their_order():
    importance = [1e38, 1e-3, 2e-3, 3e-3, float("inf"), -1.0, 5.0, 6.0, 7.0, 1e30]
    assert order(with_importance(importance)) == [5, 1, 2, 3, 6, 7, 8, 9, 0, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "bleu"}, "criterion is 'bleu'; choose one of ppl, taylor"),
        ({"protect": [4]}, r"protect is \[4\]; give two numbers of layers"),
        ({"protect": [4, -1]}, "give two numbers of layers, the first and the last"),
        ({"protect": [4, 1.5]}, "give two numbers of layers"),
        ({"protect": 4}, "protect is 4; give two numbers of layers"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(RegistryError, match=message):
        build("shortened-llama", SIZES, options)
