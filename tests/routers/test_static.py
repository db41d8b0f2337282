"""Routers with one order of layers, or one set for each budget, against brute force."""

from math import acos, pi

import pytest
import torch
from torch.nn import functional as F
from torch.nn.functional import cosine_similarity

from buddy import BudgetError, Geometry
from buddy.engine.model import RoutedLM, geometry_of
from routers.angular import Angular
from routers.full import FullDepth
from routers.reverse_order import ReverseOrder
from routers.shortened_llama import ShortenedLlama
from routers.shortgpt import ShortGPT
from routers.uniform import UniformRouter
from tests.routers.landscape import SIZES, Landscape, context, left_out, searched
from tests.routers.uneven import LAYERS, SINKS, WINDOWS, BruteForce, calibrated, uneven_backbone
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
    router = calibrated(ShortGPT, seed)
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
    with pytest.raises(BudgetError, match=r"0\.5"):
        routed.executed_layers(0.5)


def distance(states: tuple[torch.Tensor, ...], before: int, after: int) -> float:
    """Mean angle between the last tokens of what enters two layers, one window after the other (eq. 6)."""
    angles = []
    for x, y in zip(states[before][:, -1].double(), states[after][:, -1].double(), strict=True):
        angles.append(acos(float(x @ y / (x.norm() * y.norm()))) / pi)
    return sum(angles) / len(angles)


@pytest.mark.parametrize("context_layer", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_number_of_layers_loses_the_block_that_brute_force_finds(seed, context_layer):
    states = uneven_backbone(seed).model(WINDOWS, output_hidden_states=True).hidden_states
    router = calibrated(Angular, seed, context_layer=context_layer)
    routable, starts = LAYERS - context_layer - 1, set()
    for n in range(1, routable + 1):
        angles = [
            distance(states, first, first + n) for first in range(context_layer, context_layer + routable - n + 1)
        ]
        start = angles.index(min(angles))
        assert left_out(router, LAYERS - n) == set(range(start, start + n))
        starts.add(start)
    assert left_out(router, LAYERS) == set()
    assert len(starts) > 1


def test_of_equal_blocks_the_earlier_goes():
    sizes = Geometry(layers=7, context_layer=1, hidden=8, features=4)
    probe = Landscape(sizes)
    probe.angular_distance = torch.ones(6, 6).triu(1)
    router = searched(Angular, probe)
    for n in range(6):
        assert left_out(router, 7 - n) == set(range(n))


def order(router: ShortenedLlama) -> list[int]:
    """Layers in the order in which they go as the budget falls."""
    gone: list[int] = []
    for k in range(11, 1, -1):
        (new,) = left_out(router, k) - {*gone}
        gone.append(new)
    return gone


@pytest.mark.parametrize("seed", [0, 1])
def test_by_perplexity_the_least_missed_layer_goes_first(seed):
    brute = BruteForce(seed)
    assert order(calibrated(ShortenedLlama, seed)) == sorted(range(10), key=lambda layer: brute.ce([layer]))


@pytest.mark.parametrize("seed", [0, 1])
def test_by_taylor_the_layer_of_least_weight_times_gradient_goes_first(seed):
    model = uneven_backbone(seed).model.requires_grad_(True)
    F.cross_entropy(model(WINDOWS).logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()
    importance = [
        sum((p * p.grad).abs().sum().item() for name, p in layer.named_parameters() if name.endswith("proj.weight"))
        for layer in model.model.layers
    ]
    plain = sorted(range(10), key=lambda layer: importance[1 + layer])
    assert order(calibrated(ShortenedLlama, seed, criterion="taylor", protect=[0, 0])) == plain
    protected = [0, 1, 2, 9]  # layers 1, 2, 3 of the first four and 10 of the last two
    unprotected = [layer for layer in plain if layer not in protected]
    plus = unprotected + [layer for layer in plain if layer in protected]
    assert order(calibrated(ShortenedLlama, seed, criterion="taylor")) == plus != plain


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
    assert order(searched(ShortenedLlama, probe, **options)) == last
