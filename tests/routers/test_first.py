"""FiRST: its gates, their weights in training, and its penalty."""

import pytest
import torch

from buddy import Geometry
from buddy.engine.model import RoutedLM, geometry_of
from routers.first import FiRST
from tests.tiny import tiny_backbone

SIZES = Geometry(layers=6, context_layer=1, hidden=8, features=4)
IDS = torch.randint(3, 259, (3, 14), generator=torch.Generator().manual_seed(0))
STATES = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
EXECUTED = torch.tensor([3, 4, 6])


def awake(sizes: Geometry = SIZES, **options) -> FiRST:
    """A router whose gates differ."""
    router, generator = FiRST(sizes, **options), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


@pytest.mark.parametrize("budget_aware", [True, False])
def test_a_gate_is_linear_in_the_normalised_state(budget_aware):
    router, executed = awake(budget_aware=budget_aware), EXECUTED[:, None].expand(3, 5)
    for index in range(4):
        logits = router.gate(index, STATES, executed)
        for row in range(3):
            for t in range(5):
                x = (STATES[row, t] - STATES[row, t].mean()) / (STATES[row, t].var(correction=0) + 1e-5).sqrt()
                expected = router.weight[index] @ x + router.bias[index]
                if budget_aware:
                    expected = expected + router.shift[index] * ((EXECUTED[row] - 2) / 4 - 1)
                assert logits[row, t].item() == pytest.approx(expected.item(), abs=1e-4)
        torch.testing.assert_close(logits, router.gate(index, 100 * STATES, executed), atol=1e-3, rtol=1e-3)


def test_hard_gates_are_zero_or_one_with_the_gradient_of_soft_ones():
    logits = torch.tensor([-2.0, -0.1, 0.1, 3.0], requires_grad=True)
    hard, soft = (FiRST(SIZES, gates=gates).weigh(logits) for gates in ("hard", "soft"))
    assert hard.detach().round(decimals=6).tolist() == [0, 0, 1, 1]
    assert torch.equal(soft, logits.sigmoid())
    gradients = [torch.autograd.grad(weights.sum(), logits)[0] for weights in (hard, soft)]
    torch.testing.assert_close(*gradients)


def test_the_penalty_is_silent_with_a_layer_of_slack():
    weights = torch.zeros(3, 10, 4)
    for row, layers in enumerate((0, 1, 4)):
        weights[row, :, :layers] = 1.0
    router = FiRST(SIZES, penalty_weight=8.0)
    assert router.penalty(weights, torch.tensor([3, 4, 6])).tolist() == [0, 0, 2]  # one above k − 1 = 3 of four layers
    assert router.penalty(weights, torch.tensor([3, 3, 5])).tolist() == [0, 2, 4]


@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_one_plan_an_input_unless_tokens_ask_for_themselves(scope):
    backbone = tiny_backbone("llama")
    routed = RoutedLM(backbone, awake(geometry_of(backbone), scope=scope))
    with torch.no_grad():
        routed.router.weight *= 3
        routed.router.shift.zero_()
    runs = routed(IDS, executed=torch.tensor([4, 4, 4]), prompt=6).runs[:, 1:]
    assert bool((runs == runs[:, :1]).all()) == (scope == "prompt")
    assert len(runs[:, -1].unique(dim=0)) > 1, "inputs differ"
