"""A policy over budgets: what it is rewarded for is what it learns to choose."""

import math

import pytest
import torch

from buddy.errors import BudgetError
from buddy.predictor.features import feature_size, prompt_features
from buddy.predictor.grpo import BudgetPolicy, grpo_loss, rewards_of, train_policy
from buddy.schema import PredictorSection
from tests.predictor.test_regress import ARMS, GEOMETRY, contexts

SIZE = feature_size(GEOMETRY)


def policy(seed: int = 0) -> BudgetPolicy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BudgetPolicy(SIZE, ARMS, hidden=16)


def losses(features: torch.Tensor) -> torch.Tensor:
    """Easy requests, by the sign of one feature, lose nothing at any budget; hard ones lose a lot."""
    hard = (features[:, 0] > 0).double()[:, None]
    return 2.0 + hard * torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("cost", [0.0, 2.0, 1000.0])
def test_it_learns_what_full_information_would_choose(cost):
    """Against the arm of the largest reward for each request, which GRPO knows from samples only."""
    features, ours = prompt_features(contexts(64)), policy()
    section = PredictorSection(cost=cost, entropy=0.0, steps=400, lr=3e-3)
    seen = train_policy(ours, features, losses(features), 6, section)
    rewards = rewards_of(losses(features), ARMS, 6, section)
    best = rewards.max(1).values
    chosen = rewards[torch.arange(64), torch.tensor([ARMS.index(k) for k in ours.chooser(6)(contexts(64)).tolist()])]
    assert (chosen >= best - 1e-9).float().mean() > 0.9
    assert best.mean() - seen["reward"][-1][1] < 0.2 * (best.mean() - seen["reward"][0][1])
    assert seen["entropy"][0][1] == pytest.approx(math.log(3), abs=0.05)
    assert [step for step, _ in seen["layers"]] == sorted({0, *range(4, 401, 4), 400})


def test_entropy_and_kl_hold_it():
    features = prompt_features(contexts(32))
    hard = 2.0 + torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).expand(32, 3)
    ends = {}
    for name, weights in {"free": {"entropy": 0.0}, "entropy": {"entropy": 20.0}, "kl": {"kl": 20.0}}.items():
        section = PredictorSection(steps=200, lr=3e-3, **weights)
        ends[name] = train_policy(policy(), features, hard, 6, section)["entropy"][-1][1]
    assert ends["free"] < 0.5
    assert ends["entropy"] > 0.95 * math.log(3)
    assert ends["kl"] > 0.8 * math.log(3)


def test_rewards():
    found = rewards_of(torch.tensor([[1.0, 2.0, 3.0]]), (6, 4, 3), 6, PredictorSection(quality=5.0, cost=0.6))
    torch.testing.assert_close(found, torch.tensor([[-5.6, -10.4, -15.3]]))


def test_thegrpo_loss_is_the_one_written_down():
    """Against the formula spelt out with loops, on the same draws."""
    ours, start = policy(0), policy(1)
    features, rewards = prompt_features(contexts(2)), torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0]])
    section = PredictorSection(entropy=0.3, kl=0.7, samples=4)
    found = grpo_loss(ours, start, features, rewards, section, torch.Generator().manual_seed(5))
    log, before = ours(features).log_softmax(-1), start(features).log_softmax(-1)
    drawn = torch.multinomial(log.exp(), 4, replacement=True, generator=torch.Generator().manual_seed(5))
    total = 0.0
    for row in range(2):
        earned = [rewards[row, arm].item() for arm in drawn[row]]
        mean = sum(earned) / 4
        deviation = math.sqrt(sum((each - mean) ** 2 for each in earned) / 4)
        gain = sum(
            (e - mean) / (deviation + 1e-6) * log[row, a].item() for e, a in zip(earned, drawn[row], strict=True)
        )
        entropy = -sum(math.exp(x) * x for x in log[row].tolist())
        held = sum(math.exp(x) * (x - y) for x, y in zip(log[row].tolist(), before[row].tolist(), strict=True))
        total += -gain / 4 - 0.3 * entropy + 0.7 * held
    assert found.item() == pytest.approx(total / 2, rel=1e-4)


@pytest.mark.parametrize("samples", [3, 4])
def test_a_group_of_one_kind_teaches_nothing(samples):
    """Whatever the rewards are: the mean of three equal numbers may be off in its last digit."""
    features = prompt_features(contexts(8))
    flat = torch.linspace(2, 3, 8, dtype=torch.float64)[:, None].expand(8, 3)
    ours = policy()
    before = [parameter.clone() for parameter in ours.parameters()]
    section = PredictorSection(cost=0.0, entropy=0.0, steps=20, lr=1e-3, samples=samples)
    train_policy(ours, features, flat, 6, section)
    moved = [(one - other).abs().max() for one, other in zip(ours.parameters(), before, strict=True)]
    assert max(moved) < 1e-3


def test_a_cap_is_never_passed():
    ours = policy()
    with torch.no_grad():
        ours.output.bias.copy_(torch.tensor([100.0, 10.0, 0.0]))
    assert ours.chooser(6)(contexts(4)).tolist() == [6] * 4
    assert ours.chooser(5)(contexts(4)).tolist() == [4] * 4
    assert ours.chooser(3)(contexts(4)).tolist() == [3] * 4
    with pytest.raises(BudgetError, match="2 layers"):
        ours.chooser(2)
