"""Routers with one order, or one set a budget."""

import pytest
import torch

from buddy import BudgetError, Geometry
from buddy.calibration import Probe
from buddy.engine.model import RoutedLM, geometry_of
from routers.full import FullDepth
from routers.random import RandomRouter
from routers.shortgpt import ShortGPT
from routers.uniform import UniformRouter
from tests.routers.test_contract import WINDOWS, context
from tests.tiny import tiny_backbone


def geometry(layers: int, context_layer: int = 1) -> Geometry:
    return Geometry(layers=layers, context_layer=context_layer, hidden=8, features=4)


def test_shortgpt_orders_layers_by_block_influence():
    backbone = tiny_backbone("llama")
    router = ShortGPT(geometry_of(backbone))
    probe = Probe(RoutedLM(backbone, router), WINDOWS)
    router.calibrate(probe)
    scores = router.score(context(router.geometry))
    assert scores.argsort().tolist() == probe.block_influence.argsort().tolist()
    assert scores.unique().numel() == 4


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


def test_random_is_one_order_for_each_seed():
    sizes = geometry(30)
    orders = [RandomRouter(sizes, seed=seed).score(context(sizes)) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert orders[0].unique().numel() == sizes.routable


def test_full_depth_refuses_less():
    backbone = tiny_backbone("llama")
    routed = RoutedLM(backbone, FullDepth(geometry_of(backbone)))
    assert routed.executed_layers(1.0) == 6
    with pytest.raises(BudgetError, match=r"This router runs every layer; ask for budget 1\.0 instead of 0\.5"):
        routed.executed_layers(0.5)
