"""Layerwise routers that decide for each token: what training makes of their gates, and their penalties."""

import pytest
import torch

from buddy import Geometry
from buddy.calibration.bridges import fit_bridges
from buddy.engine.model import RoutedLM, geometry_of
from buddy.losses import DenseDistribution, Objective, kl_to_dense
from buddy.training.estimators import TrainingBatch, Weighted
from routers.first import FiRST
from routers.flexidepth import FlexiDepth
from routers.mindskip import MindSkip
from routers.skipgpt import SkipGPT
from tests.routers.planted import EXECUTED, needed, planted_backbone, random_ids, trained

SIZES = Geometry(layers=6, context_layer=1, hidden=8, features=4)
ROUTERS = [
    (FiRST, {"scope": "token", "penalty_weight": 0.5}),
    (SkipGPT, {"slack": 0.0}),
    (MindSkip, {"slack": 0.0, "penalty_weight": 1.0}),
    (FlexiDepth, {"slack": 0.0, "penalty_weight": 0.3}),
]


def cost(routed: RoutedLM, ids: torch.Tensor, runs: torch.Tensor) -> float:
    """Mean KL to the dense model of a plan (B, T, L) or (L,)."""
    runs = runs.expand(*ids.shape, -1).clone()
    runs[:, :1] = True
    return kl_to_dense(DenseDistribution(routed.dense(ids)), routed(ids, runs=runs).logits).mean().item()


def test_the_planted_model_needs_the_planted_layers():
    backbone = planted_backbone()
    routed, ids = RoutedLM(backbone, SkipGPT(geometry_of(backbone))), random_ids(3, 12, 0)
    plan = torch.ones(3, 12, 6, dtype=torch.bool)
    plan[..., 1:5] = needed(ids)
    assert cost(routed, ids, plan) < 1e-3
    for layer in range(1, 5):
        without = torch.ones(6, dtype=torch.bool)
        without[layer] = False
        assert cost(routed, ids, without) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize(("router", "options"), ROUTERS)
def test_training_closes_gates_whose_layers_a_token_does_not_need_and_keeps_the_others(router, options):
    routed, ids = trained(router, **options), random_ids(8, 16, 0)
    output = routed(ids, executed=torch.full((8,), EXECUTED))
    assert (output.executed[:, 1:] == EXECUTED).all()
    assert (output.runs[:, 1:, 1:5] == needed(ids)[:, 1:]).float().mean() > 0.9


def test_a_draw_of_skipgpt_is_open_with_the_probability_of_its_gate():
    router, logits = SkipGPT(SIZES, temperature=2.0), torch.tensor([-2.0, 0.0, 1.5], requires_grad=True)
    torch.manual_seed(0)
    draws = router.train().weigh(logits.expand(20000, 3))
    assert set(draws.detach().round(decimals=5).flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(draws.detach().mean(0), logits.detach().sigmoid(), atol=0.015, rtol=0)
    draws.mean(0).sum().backward()
    noise = torch.rand(200_000, generator=torch.Generator().manual_seed(1)).logit()
    soft = ((logits.detach()[:, None] + noise) / 2).sigmoid()
    torch.testing.assert_close(logits.grad, (soft * (1 - soft) / 2).mean(1), atol=0.003, rtol=0)
    assert router.eval().weigh(logits).detach().round().tolist() == [0, 0, 1], "without noise in serving"


def test_noise_depends_on_the_step_alone():
    backbone = planted_backbone()
    routed = RoutedLM(backbone, SkipGPT(geometry_of(backbone), start=0.0).train())
    batch = TrainingBatch(random_ids(2, 12, 0), torch.full((2,), EXECUTED), torch.arange(1, 11))
    losses = []
    for seed in (0, 1, 0):
        torch.rand(1)
        losses.append(Weighted(Objective())(routed, batch, torch.Generator().manual_seed(seed)).loss.item())
    assert losses[0] == losses[2]
    assert losses[0] != losses[1]


def test_skipgpt_is_held_to_its_target_from_both_sides():
    weights = torch.zeros(3, 10, 4)
    for row, layers in enumerate((0, 2, 4)):
        weights[row, :, :layers] = 1.0
    executed = torch.tensor([5, 4, 4])  # k = 3, 2, 2 of four layers
    assert SkipGPT(SIZES, penalty_weight=8.0, slack=0.0).penalty(weights, executed).tolist() == [6, 0, 4]
    assert SkipGPT(SIZES, penalty_weight=8.0, slack=1.0).penalty(weights, executed).tolist() == [4, 2, 6]


def test_mindskip_bounds_each_layer_by_itself():
    weights = torch.zeros(2, 10, 4)
    weights[0, :, 0] = 1.0  # a quarter of all, but all of one layer
    weights[1, :5] = 1.0  # half of each layer
    executed = torch.tensor([4, 4])
    assert MindSkip(SIZES, penalty_weight=8.0, slack=0.0).penalty(weights, executed).tolist() == [4, 0]
    assert MindSkip(SIZES, penalty_weight=8.0, slack=1.0).penalty(weights, executed).tolist() == [6, 8]


def test_flexidepth_squares_what_a_token_runs_above_its_target():
    weights = torch.zeros(2, 10, 4)
    weights[0] = 1.0
    weights[1, :5] = 1.0  # all layers for half of the tokens
    executed = torch.tensor([4, 4])
    assert FlexiDepth(SIZES, penalty_weight=2.0, slack=0.0).penalty(weights, executed).tolist() == [8, 4]
    assert FlexiDepth(SIZES, penalty_weight=2.0, slack=1.0).penalty(weights, executed).tolist() == [18, 9]


def test_a_gate_of_flexidepth_reads_through_its_bottleneck():
    torch.manual_seed(0)
    router, states = FlexiDepth(SIZES, bottleneck=3), torch.randn(5, 8)
    torch.nn.init.normal_(router.out)
    for index in range(4):
        expected = []
        for state in states:
            narrow = torch.tanh(router.down[index] @ torch.nn.functional.layer_norm(state, (8,)))
            logit = router.out[index] @ torch.nn.functional.layer_norm(narrow, (3,))
            expected.append(logit + router.bias[index] + router.shift[index] * (3 / 4 - 1))
        torch.testing.assert_close(router.gate(index, states, torch.full((5,), 5)), torch.stack(expected))


def test_a_bridge_stands_for_the_adapter_of_flexidepth():
    backbone = planted_backbone()
    routed, ids = RoutedLM(backbone, FlexiDepth(geometry_of(backbone))), random_ids(8, 16, 0)
    executed, dense, losses = torch.full((8,), 3), DenseDistribution(routed.dense(ids)), []
    for bridges in (None, fit_bridges(routed, ids, [3] * 8, rank=4, ridge=0.1)):
        routed.bridge(bridges)
        output = routed(ids, executed=executed)
        assert (output.executed[:, 1:] == 3).all()
        losses.append(kl_to_dense(dense, output.logits).mean().item())
    assert losses[1] < 0.7 * losses[0]
