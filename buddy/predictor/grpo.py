"""`grpo`: a policy over budgets, trained by group-relative advantages (2606.09514, budget predictor)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.console import Track
from buddy.predictor.features import Predictor
from buddy.schema import PredictorSection

BATCH = 2  # requests a step, as in the paper
TINY = 1e-6


class BudgetPolicy(Predictor):
    """Logits over budgets from a prompt's context: Linear – SiLU – Linear; it chooses the most probable budget.

    Args:
        size: length of the feature vector.
        arms: executed layers K to choose from.
        hidden: width of the network.
    """

    name = "grpo"

    def __init__(self, size: int, arms: Sequence[int], *, hidden: int = 32) -> None:
        super().__init__(arms)
        self.input = nn.Linear(size, hidden)
        self.output = nn.Linear(hidden, len(self.arms))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., arms) of features (..., size)."""
        return self.output(F.silu(self.input(features)))

    def choose(self, features: Tensor, allowed: Sequence[int]) -> Tensor:
        """See `Predictor.choose`."""
        arms = torch.tensor(self.arms, device=features.device)[allowed]
        return arms[self(features)[..., allowed].argmax(-1)]


def train_policy(
    policy: BudgetPolicy,
    features: Tensor,
    losses: Tensor,
    layers: int,
    section: PredictorSection,
    *,
    seed: int = 0,
    points: int = 100,
    track: Track = iter,
) -> dict[str, list[tuple[int, float]]]:
    """Train in place by GRPO; returns values at about `points` steps, the start and the end among them.

    For each request M budgets are drawn from the policy and rewarded by −quality · CE − cost · K/L. The advantage is
    the reward normalised within the group, and the loss −mean(A · log π) − β H(π) + kl · KL(π ‖ π at the start). The
    router is frozen, so the cross-entropy of each request under each budget is measured only once.

    Args:
        policy: the one to train.
        features: (N, size) of the requests' prompts.
        losses: (N, arms) nats per token, of each request under each arm.
        layers: L.
        section: factors of the cross-entropy in nats (λ_perf) and of K/L (λ_cost) in the reward, and of the policy's
            entropy (β) and its KL to the start in the loss; optimizer steps on `BATCH` requests each, the rate of Adam,
            and M, the samples.
        seed: determines the draws of requests and samples.
        points: number of steps with values.
        track: wraps the steps to show progress.

    Returns:
        Pairs of step and value, means over all requests: "entropy" of the policy in nats, at most ln(arms), expected
        "reward", and expected "layers".
    """
    random = torch.Generator().manual_seed(seed)
    rewards = rewards_of(losses.double(), policy.arms, layers, section)
    start = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=section.lr)
    every, steps = max(1, section.steps // points), section.steps
    progress = {name: [(0, value)] for name, value in _means(policy, features, rewards).items()}
    for step in track(range(1, steps + 1)):
        rows = torch.randint(len(features), (BATCH,), generator=random)
        optimizer.zero_grad()
        grpo_loss(policy, start, features[rows], rewards[rows], section, random).backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            for name, value in _means(policy, features, rewards).items():
                progress[name].append((step, value))
    return progress


def rewards_of(losses: Tensor, arms: Sequence[int], layers: int, section: PredictorSection) -> Tensor:
    """(N, arms): the reward of each request under each arm, in the dtype of the losses, best float64.

    In single precision the mean of three equal rewards may differ from them by more than `TINY`.
    """
    return -section.quality * losses - section.cost * torch.tensor(arms) / layers


def grpo_loss(
    policy: BudgetPolicy,
    start: BudgetPolicy,
    features: Tensor,
    rewards: Tensor,
    section: PredictorSection,
    random: torch.Generator,
) -> Tensor:
    """() the loss of `train_policy`, of requests with features (B, size) and rewards (B, arms)."""
    log = policy(features).log_softmax(-1)
    drawn = torch.multinomial(log.detach().exp(), section.samples, replacement=True, generator=random)
    reward = rewards.gather(1, drawn)
    spread = reward.std(1, keepdim=True, correction=0)
    advantage = (reward - reward.mean(1, keepdim=True)) / (spread + TINY)
    kl = (log.exp() * (log - start(features).log_softmax(-1))).sum(-1)
    gain = (advantage.to(log) * log.gather(1, drawn)).mean(1)
    return (section.kl * kl - gain - section.entropy * _entropy(log)).mean()


def _entropy(log: Tensor) -> Tensor:
    return -(log.exp() * log).sum(-1)


@torch.no_grad()
def _means(policy: BudgetPolicy, features: Tensor, rewards: Tensor) -> dict[str, float]:
    log = policy(features).log_softmax(-1)
    each = {"entropy": _entropy(log), "reward": (log.exp() * rewards).sum(-1)}
    each["layers"] = (log.exp() * torch.tensor(policy.arms)).sum(-1)
    return {name: value.mean().item() for name, value in each.items()}
