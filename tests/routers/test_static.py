"""Routers with one order, or one set a budget."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from buddy import BudgetError, Geometry
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from routers.full import FullDepth
from routers.reverse_order import ReverseOrder
from routers.shortgpt import ShortGPT
from routers.uniform import UniformRouter
from tests.routers.landscape import left_out
from tests.routers.test_contract import context
from tests.routers.uneven import LAYERS, SINKS, WINDOWS, uneven_backbone
from tests.tiny import tiny_backbone


def geometry(layers: int, context_layer: int = 1) -> Geometry:
    return Geometry(layers=layers, context_layer=context_layer, hidden=8, features=4)


@pytest.mark.parametrize("seed", [0, 1])
def test_shortgpt_drops_the_layers_that_turn_the_hidden_state_least(seed):
    model, turned = uneven_backbone(seed).model, []
    for layer in model.model.layers[1:-1]:
        layer.register_forward_hook(
            lambda _, args, out: turned.append(1 - cosine_similarity(args[0], out, dim=-1)[:, SINKS:].mean())
        )
    model(WINDOWS)
    backbone = uneven_backbone(seed)
    router = ShortGPT(geometry_of(backbone))
    router.calibrate(CalibrationProbe(RoutedLM(backbone, router), WINDOWS, 2))
    torch.testing.assert_close(router.influence, torch.stack(turned))
    order = torch.stack(turned).argsort().tolist()
    for n in range(11):
        assert left_out(router, LAYERS - n) == set(order[:n])


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


@pytest.mark.parametrize(("layers", "context_layer"), [(3, 1), (12, 1), (12, 4)])
def test_reverse_order_drops_the_last_before_the_final_layer(layers, context_layer):
    router = ReverseOrder(geometry(layers, context_layer))
    routable = layers - context_layer - 1
    for n in range(routable + 1):
        assert left_out(router, layers - n) == set(range(routable - n, routable))


def test_full_depth_refuses_less():
    backbone = tiny_backbone("llama")
    routed = RoutedLM(backbone, FullDepth(geometry_of(backbone)))
    assert routed.executed_layers(1.0) == 6
    with pytest.raises(BudgetError, match=r"This router runs every layer; ask for budget 1\.0 instead of 0\.5"):
        routed.executed_layers(0.5)
