"""Routers with one order of layers, or one set for each budget, from planted measurements."""

import pytest
import torch

from buddy import BudgetError, Geometry
from buddy.engine.model import RoutedLM, geometry_of
from routers.angular import Angular
from routers.full import FullDepth
from routers.reverse_order import ReverseOrder
from routers.shortened_llama import ShortenedLlama
from routers.shortgpt import ShortGPT
from routers.uniform import UniformRouter
from tests.routers.landscape import SIZES, Landscape, context, left_out, searched
from tests.tiny import tiny_backbone


def geometry(layers: int, context_layer: int = 1) -> Geometry:
    return Geometry(layers=layers, context_layer=context_layer, hidden=8, features=4)


def removed(router) -> list[int]:
    """Routable layers in the order in which they go as the budget falls, one at a time."""
    sizes, gone = router.geometry, []
    for k in range(sizes.layers - 1, sizes.always_on - 1, -1):
        (new,) = left_out(router, k) - {*gone}
        gone.append(new)
    return gone


@pytest.mark.parametrize(
    ("cls", "measure", "options"),
    [
        (ShortGPT, "block_influence", {}),
        (ShortenedLlama, "loss_increase", {}),
        (ShortenedLlama, "taylor", {"criterion": "taylor", "protect": [0, 0]}),
    ],
)
def test_the_layers_of_least_measure_go_first(cls, measure, options):
    probe = Landscape(SIZES)
    values = torch.rand(10, generator=torch.Generator().manual_seed(0))
    setattr(probe, measure, values)
    assert removed(searched(cls, probe, **options)) == values.argsort().tolist()


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
    probe = Landscape(SIZES)
    probe.taylor = probe.loss_increase = torch.arange(10.0, 0, -1)
    assert removed(searched(ShortenedLlama, probe, **options)) == last


@pytest.mark.parametrize(("layers", "context_layer"), [(3, 1), (12, 1), (12, 4)])
def test_reverse_order_drops_the_last_before_the_final_layer(layers, context_layer):
    assert removed(ReverseOrder(geometry(layers, context_layer))) == [*range(layers - context_layer - 1)][::-1]


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("context_layer", [1, 3])
def test_angular_drops_the_block_of_least_distance_for_each_number_of_layers(context_layer, equal):
    probe = Landscape(geometry(12, context_layer))
    routable, generator = probe.geometry.routable, torch.Generator().manual_seed(0)
    distance = torch.rand(routable + 1, routable + 1, generator=generator)
    probe.angular_distance = (torch.ones_like(distance) if equal else distance).triu(1)
    router, starts = searched(Angular, probe), set()
    for n in range(routable + 1):
        start = min(range(routable - n + 1), key=lambda i: probe.angular_distance[i, i + n].item())
        assert left_out(router, 12 - n) == set(range(start, start + n))
        starts.add(start)
    assert (len(starts) == 1) == equal, "of equal blocks the earlier goes"


@pytest.mark.parametrize(("layers", "context_layer"), [(3, 1), (6, 1), (30, 1), (30, 3), (33, 2)])
def test_uniform_keeps_evenly_spaced_layers_for_every_k(layers, context_layer):
    sizes = geometry(layers, context_layer)
    router = UniformRouter(sizes)
    for k in range(sizes.routable + 1):
        scores = router.score(context(sizes, executed=k + sizes.always_on))
        kept = scores.nonzero()[:, 0]
        assert scores[kept].tolist() == [1.0] * k
        gaps = kept.diff()
        assert not k or kept.max() < sizes.routable
        assert k < 2 or gaps.max() - gaps.min() <= 1, f"{k} of {sizes.routable}: {kept.tolist()}"
        ends = (kept[0] + 1, sizes.routable - kept[-1]) if k else (0, 0)
        assert abs(ends[0] - ends[1]) <= 1, "as far from the first layer as from the last"


def test_full_depth_refuses_less():
    backbone = tiny_backbone()
    routed = RoutedLM(backbone, FullDepth(geometry_of(backbone)))
    assert routed.executed_layers(1.0) == 6
    with pytest.raises(BudgetError, match=r"0\.5"):
        routed.executed_layers(0.5)
