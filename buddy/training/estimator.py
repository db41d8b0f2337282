"""How a discrete plan teaches the scores that it came from.

An estimator takes windows and their budgets and returns a loss whose gradient moves the router. Two are built in:
`Perturbed` runs plans forward only and credits each token with what its own plan did; `StraightThrough` back-propagates
through hard gates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy.engine.model import RoutedLM
from buddy.router import Context
from buddy.training.objective import Dense, Objective


@dataclass(frozen=True)
class Batch:
    """Windows to learn from.

    Attributes:
        input_ids: (B, T) long.
        executed: (B,) long, K per row.
        scored: (S,) long, positions whose next-token prediction counts.
        prompt: tokens at the start that share a plan where the model's `prompt_plan` is "shared".
    """

    input_ids: Tensor
    executed: Tensor
    scored: Tensor
    prompt: int = 0


@dataclass(frozen=True)
class Estimate:
    """Outcome of one step.

    Attributes:
        loss: scalar whose gradient with respect to the router is the estimate.
        objective: (B,) mean objective of each row under the plans tried, in nats; nought at full depth under KL.
        runs: (B, T, L) bool, the plans that the router's unperturbed scores ask for.
        context: what the router saw, leading dimensions (B, T).
    """

    loss: Tensor
    objective: Tensor
    runs: Tensor
    context: Context


class Estimator(Protocol):
    """The interface of both."""

    def __call__(self, routed: RoutedLM, batch: Batch, generator: torch.Generator) -> Estimate:
        """One step; `generator` is the only source of randomness."""


class Perturbed:
    """Perturbed plans with credit per token (perturbed optimizers, 2002.08676).

    Exact top-k of s ± σε in antithetic pairs, forward only. Each token is credited with its own objective against the
    mean over the plans tried for that token: ∂E[f]/∂s ≈ mean_m (f_m − mean f) ε_m / σ. Gates stay hard, and the pull
    "more compute is better", common to all layers, cancels in the fixed count.

    Args:
        objective: what a plan is judged by.
        plans: M, plans tried per window; an even number.
        sigma: σ, in units of scores.
    """

    def __init__(self, objective: Objective, plans: int = 4, sigma: float = 0.15) -> None:
        self.objective, self.plans, self.sigma = objective, plans, sigma

    def __call__(self, routed: RoutedLM, batch: Batch, generator: torch.Generator) -> Estimate:
        context, dense, targets = _dense_pass(routed, batch)
        scores = routed.router.score(context)
        runs = routed.plan(scores.detach(), batch.executed, batch.prompt)
        value = torch.zeros(len(batch.input_ids), device=scores.device)
        free = (batch.executed < routed.geometry.layers).nonzero()[:, 0]  # full depth leaves nothing to try
        if not len(free):
            return Estimate(scores.sum() * 0.0, value, runs, context)
        part = replace(batch, input_ids=batch.input_ids[free], executed=batch.executed[free])
        tried, noise = self._try(routed, part, scores.detach()[free], dense[free], targets[free], generator)
        value[free] = tried.mean((0, 2))
        direction = _direction(tried, noise, self.sigma)
        return Estimate((direction * scores[free][:, batch.scored]).sum(-1).mean(), value, runs, context)

    @torch.no_grad()
    def _try(
        self,
        routed: RoutedLM,
        batch: Batch,
        scores: Tensor,
        dense: Dense,
        targets: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Objectives (M, B, S) of M plans and the noise (M, B, S, R) that made them; all plans in one forward."""
        half = torch.randn(self.plans // 2, *scores.shape, generator=generator).to(scores)
        noise = torch.stack([half, -half], 1).flatten(0, 1)
        rows, executed = (x.repeat(self.plans, *[1] * (x.dim() - 1)) for x in (batch.input_ids, batch.executed))
        runs = routed.plan((scores + self.sigma * noise).flatten(0, 1), executed, batch.prompt)
        logits = routed(rows, runs=runs, keep=batch.scored).logits.unflatten(0, (self.plans, -1))
        values = torch.stack([self.objective(dense, plan, targets) for plan in logits])
        return values, noise[:, :, batch.scored]


def _direction(values: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(B, S, R): how the scores should not move. Rows are put on one scale, or deep budgets would never be heard."""
    credit = values - values.mean(0)
    credit = credit / (values.std(0).mean(-1, keepdim=True) + 1e-6)
    return (credit[..., None] * noise).mean(0) / sigma


class StraightThrough:
    """Hard top-k forward, softmax backward (2606.09514, section 3), through a backbone that computes every layer.

    A skipped layer's gate is always pulled towards running, and the pull common to all layers drowns the differences
    in it; since the count is fixed, that common part is projected out of each token's gradient.

    Args:
        objective: what a plan is judged by.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, routed: RoutedLM, batch: Batch, generator: torch.Generator) -> Estimate:
        context, dense, targets = _dense_pass(routed, batch)
        scores = routed.router.score(context)
        runs = routed.plan(scores.detach(), batch.executed, batch.prompt)
        logits = routed(batch.input_ids, runs=runs, gates=self._gates(routed, scores, runs), keep=batch.scored).logits
        value = self.objective(dense, logits, targets)
        return Estimate(value.mean(), value.detach().mean(1), runs, context)

    @staticmethod
    def _gates(routed: RoutedLM, scores: Tensor, runs: Tensor) -> Tensor:
        """(B, T, L): 0 or 1 by the plan, with the softmax's gradient; sinks run whatever the scores say."""
        geometry = routed.geometry
        soft = scores.softmax(-1) * geometry.routable
        if soft.requires_grad:
            soft.register_hook(lambda gradient: gradient - gradient.mean(-1, keepdim=True))
        routed_here = torch.arange(runs.shape[1], device=runs.device) >= routed.sink_tokens
        pull = (soft - soft.detach()) * routed_here[:, None]
        return runs.to(scores.dtype) + F.pad(pull, (geometry.context_layer, 1))


def _dense_pass(routed: RoutedLM, batch: Batch) -> tuple[Context, Dense, Tensor]:
    """The router's context for every token, the asked K in it; the dense distribution; the next tokens (B, S)."""
    with torch.no_grad():
        output = routed(batch.input_ids, keep=batch.scored)
        seen = output.context
        executed = batch.executed[:, None].expand(batch.input_ids.shape)
        context = Context(seen.pooled, seen.newest, seen.hidden, executed)
        return context, Dense(output.logits), batch.input_ids[:, batch.scored + 1]
