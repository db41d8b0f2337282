"""`grpo`: a policy over budgets, trained by group-relative advantages (2606.09514, budget predictor)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.predictor.features import Predictor, Track

BATCH = 2  # requests a step, as in the paper
TINY = 1e-6


@dataclass(frozen=True)
class RewardWeights:
    """Weights of the reward and of the regularisation.

    Attributes:
        quality: factor of the cross-entropy in nats a token (λ_perf).
        cost: factor of K/L, the share of layers that run (λ_cost).
        entropy: β, factor of the policy's entropy in nats, against early convergence.
        kl: factor of KL(policy ‖ policy at the start) in nats.
    """

    quality: float = 5.0
    cost: float = 0.05
    entropy: float = 0.01
    kl: float = 0.0


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


@dataclass(frozen=True)
class Progress:
    """State of the training, over all requests.

    Attributes:
        step: steps done.
        entropy: the policy's mean entropy, nats; at most ln(arms).
        reward: mean expected reward.
        layers: mean expected layers.
    """

    step: int
    entropy: float
    reward: float
    layers: float


def train_policy(
    policy: BudgetPolicy,
    features: Tensor,
    losses: Tensor,
    layers: int,
    weights: RewardWeights,
    *,
    steps: int,
    lr: float,
    samples: int = 4,
    seed: int = 0,
    points: int = 100,
    track: Track = iter,
) -> list[Progress]:
    """Train in place by GRPO; returns the progress at about `points` steps, the start and the end among them.

    For each request M budgets are drawn from the policy and rewarded by −quality · CE − cost · K/L. The advantage is
    the reward normalised within the group, and the loss −mean(A · log π) − β H(π) + kl · KL(π ‖ π at the start). The
    router is frozen, so the cross-entropy of each request under each budget is measured only once.

    Args:
        policy: the one to train.
        features: (N, size) of the requests' prompts.
        losses: (N, arms) nats a token, of each request under each arm.
        layers: L.
        weights: factors of the reward and of the regularisation.
        steps: optimizer steps, each on `BATCH` requests.
        lr: learning rate of Adam.
        samples: M.
        seed: determines the draws of requests and samples.
        points: number of progress entries.
        track: wraps the steps to show progress.
    """
    random = torch.Generator().manual_seed(seed)
    rewards = rewards_of(losses.double(), policy.arms, layers, weights)
    start = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    every, progress = max(1, steps // points), [_progress(policy, features, rewards, 0)]
    for step in track(range(1, steps + 1)):
        rows = torch.randint(len(features), (BATCH,), generator=random)
        optimizer.zero_grad()
        grpo_loss(policy, start, features[rows], rewards[rows], weights, samples, random).backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            progress.append(_progress(policy, features, rewards, step))
    return progress


def rewards_of(losses: Tensor, arms: Sequence[int], layers: int, weights: RewardWeights) -> Tensor:
    """(N, arms): the reward of each request under each arm, in the dtype of the losses, best float64.

    In single precision the mean of three equal rewards may differ from them by more than `TINY`.
    """
    return -weights.quality * losses - weights.cost * torch.tensor(arms) / layers


def grpo_loss(
    policy: BudgetPolicy,
    start: BudgetPolicy,
    features: Tensor,
    rewards: Tensor,
    weights: RewardWeights,
    samples: int,
    random: torch.Generator,
) -> Tensor:
    """() the loss of `train_policy`, of requests with features (B, size) and rewards (B, arms)."""
    log = policy(features).log_softmax(-1)
    drawn = torch.multinomial(log.detach().exp(), samples, replacement=True, generator=random)
    reward = rewards.gather(1, drawn)
    spread = reward.std(1, keepdim=True, correction=0)
    advantage = (reward - reward.mean(1, keepdim=True)) / (spread + TINY)
    kl = (log.exp() * (log - start(features).log_softmax(-1))).sum(-1)
    gain = (advantage.to(log) * log.gather(1, drawn)).mean(1)
    return (weights.kl * kl - gain - weights.entropy * _entropy(log)).mean()


def _entropy(log: Tensor) -> Tensor:
    return -(log.exp() * log).sum(-1)


@torch.no_grad()
def _progress(policy: BudgetPolicy, features: Tensor, rewards: Tensor, step: int) -> Progress:
    log = policy(features).log_softmax(-1)
    probability = log.exp()
    layers = (probability * torch.tensor(policy.arms)).sum(-1).mean()
    return Progress(step, _entropy(log).mean().item(), (probability * rewards).sum(-1).mean().item(), layers.item())
