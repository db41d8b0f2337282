"""`grpo`: a policy over budgets, taught by group-relative advantages (2606.09514, budget predictor)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.predictor.features import Choose, allowed, features_of, ordered

BATCH = 2  # requests a step, as in the paper
TINY = 1e-6
Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Weights:
    """What the policy is rewarded and held by.

    Attributes:
        quality: of the cross-entropy, nats a token (λ_perf).
        cost: of the share of layers that run (λ_cost).
        entropy: β, keeps the policy from settling too soon.
        kl: of KL(policy ‖ policy at the start).
    """

    quality: float = 5.0
    cost: float = 0.05
    entropy: float = 0.01
    kl: float = 0.0


class BudgetPolicy(nn.Module):
    """Logits over budgets from a prompt's context: Linear – SiLU – Linear; the likeliest budget when serving.

    Args:
        size: length of the feature vector.
        arms: executed layers K to choose from.
        hidden: width of the network.
    """

    name = "grpo"

    def __init__(self, size: int, arms: Sequence[int], *, hidden: int = 32) -> None:
        super().__init__()
        self.arms = ordered(arms)
        self.input = nn.Linear(size, hidden)
        self.output = nn.Linear(hidden, len(self.arms))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (..., arms) of features (..., size)."""
        return self.output(F.silu(self.input(features)))

    def under(self, most: int) -> Choose:
        """What chooses K (...) for contexts (...), at most `most` layers; BudgetError where every arm has more."""
        places = allowed(self.arms, most)
        arms = torch.tensor(self.arms)[places]
        return lambda context: arms.to(context.pooled.device)[self(features_of(context))[..., places].argmax(-1)]


@dataclass(frozen=True)
class Progress:
    """Where a training is, over all requests.

    Attributes:
        step: steps done.
        entropy: mean of the policy's, nats; ln(arms) is a policy that chooses at random.
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
    weights: Weights,
    *,
    steps: int,
    lr: float,
    samples: int = 4,
    seed: int = 0,
    points: int = 100,
    track: Track = iter,
) -> list[Progress]:
    """Train in place by GRPO; where it was at some `points` of the way, the beginning and the end among them.

    For each request M budgets are drawn from the policy and rewarded by −quality · CE − cost · K/L. The advantage is
    the reward normalised within the group, and the loss −mean(A · log π) − β H(π) + kl · KL(π ‖ π at the start). The
    router is frozen, so the cross-entropy of a request under a budget is a number that need be measured only once.

    Args:
        features: (N, size) of the requests' prompts.
        losses: (N, arms) nats a token, of each request under each arm.
        layers: L.
        samples: M.
        track: wraps the steps to show progress.
    """
    random = torch.Generator().manual_seed(seed)
    rewards = rewards_of(losses.double(), policy.arms, layers, weights)
    start = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    every, seen = max(1, steps // points), [_progress(policy, features, rewards, 0)]
    for step in track(range(1, steps + 1)):
        rows = torch.randint(len(features), (BATCH,), generator=random)
        optimizer.zero_grad()
        loss = _loss(policy, start, features[rows], rewards[rows], weights, samples, random)
        loss.backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            seen.append(_progress(policy, features, rewards, step))
    return seen


def rewards_of(losses: Tensor, arms: Sequence[int], layers: int, weights: Weights) -> Tensor:
    """(N, arms): what each request earns under each arm; in double precision, if the losses are.

    Alike rewards then have no spread: in single precision the mean of three may be off by more than `TINY`.
    """
    return -weights.quality * losses - weights.cost * torch.tensor(arms) / layers


def _loss(
    policy: BudgetPolicy,
    start: BudgetPolicy,
    features: Tensor,
    rewards: Tensor,
    weights: Weights,
    samples: int,
    random: torch.Generator,
) -> Tensor:
    log = policy(features).log_softmax(-1)
    drawn = torch.multinomial(log.detach().exp(), samples, replacement=True, generator=random)
    earned = rewards.gather(1, drawn)
    spread = earned.std(1, keepdim=True, correction=0)
    advantage = (earned - earned.mean(1, keepdim=True)) / (spread + TINY)
    held = (log.exp() * (log - start(features).log_softmax(-1))).sum(-1)
    gain = (advantage.to(log) * log.gather(1, drawn)).mean(1)
    return (weights.kl * held - gain - weights.entropy * _entropy(log)).mean()


def _entropy(log: Tensor) -> Tensor:
    return -(log.exp() * log).sum(-1)


@torch.no_grad()
def _progress(policy: BudgetPolicy, features: Tensor, rewards: Tensor, step: int) -> Progress:
    log = policy(features).log_softmax(-1)
    chances = log.exp()
    layers = (chances * torch.tensor(policy.arms)).sum(-1).mean()
    return Progress(step, _entropy(log).mean().item(), (chances * rewards).sum(-1).mean().item(), layers.item())


def random_entropy(arms: Sequence[int]) -> float:
    """ln R, the entropy of a policy that chooses at random."""
    return math.log(len(arms))
