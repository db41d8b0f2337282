"""How a discrete plan teaches the scores that it came from.

An estimator takes windows and their budgets and returns a loss whose gradient moves the router. Three are for scores:
`Perturbed` runs plans forward only and credits each token with what its own plan did; `StraightThrough` and `Surrogate`
back-propagate through hard gates. `Weighted` is for layerwise routers, and the only one for them.

Estimators are announced by the entry points of group `buddy.estimators`, as routers are, and made by `estimator_for`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy.engine.model import RoutedLM
from buddy.errors import RegistryError, TrainingError, described
from buddy.losses import DenseDistribution, Objective
from buddy.plan import gate_order
from buddy.registry import ESTIMATORS, load
from buddy.router import AnyRouter, Context, LayerwiseRouter, scores_of

# E[ε | ε > 0] − E[ε | ε < 0]: how far apart the expected noise of a layer at the threshold is when it ran and when not
NOISE_GAP = 2 * math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class TrainingBatch:
    """Windows to learn from: a whole batch, or the share of one process.

    Attributes:
        input_ids: (B, T) long.
        executed: (B,) long, K per row.
        scored: (S,) long, positions whose next-token prediction counts.
        prompt: tokens at the start that share a plan where the model's `prompt_plan` is "shared".
        all_executed: (B · n,) long, K of the whole batch, which n processes share; None where these rows are all of it.
        rank: which of the n: these rows are numbers rank, rank + n, rank + 2n, … of the batch.
    """

    input_ids: Tensor
    executed: Tensor
    scored: Tensor
    prompt: int = 0
    all_executed: Tensor | None = None
    rank: int = 0

    @property
    def whole(self) -> Tensor:
        """(B · n,) long, K of the whole batch."""
        return self.executed if self.all_executed is None else self.all_executed

    def rows_below(self, layers: int) -> tuple[Tensor, int]:
        """Of the whole batch's rows below full depth L, the numbers of those that are here; and how many there are."""
        below = self.whole.cpu() < layers
        here = slice(self.rank, None, len(below) // len(self.executed))
        return (below.cumsum(0) - 1)[here][below[here]], int(below.sum())

    def weight(self, layers: int) -> float:
        """What to multiply this process's mean over its rows below full depth by.

        With it, the mean over processes is the mean over all such rows of the whole batch.
        """
        here, total = self.rows_below(layers)
        return len(here) * len(self.whole) / (len(self.executed) * total) if total else 1.0


@dataclass(frozen=True)
class Estimate:
    """Outcome of one step.

    Attributes:
        loss: scalar whose gradient with respect to the router is the estimate.
        objective: (B,) mean objective of each row under the plans tried, in nats; 0 at full depth under KL.
        runs: (B, T, L) bool, the plans of the scores without noise; of a layerwise router those of its gates, open
            where the weight, with its noise, is above 0.5.
        context: what the router saw, leading dimensions (B, T); None for a layerwise router, which saw hidden states.
        dense: the dense model's distribution at the scored positions, where the estimator had it from that same pass.
    """

    loss: Tensor
    objective: Tensor
    runs: Tensor
    context: Context | None
    dense: DenseDistribution | None = None


class Estimator(Protocol):
    """The interface of all: a class made with an `Objective` and the options of a recipe's section `objective`."""

    def __call__(self, routed: RoutedLM, batch: TrainingBatch, generator: torch.Generator) -> Estimate:
        """One step; `generator` is the only source of randomness, the same in each process of a batch.

        Draws belong to the window's number in the whole batch, so that a share of the batch draws what the whole does.

        A class whose loss also has gradients for an adapter and bridges says so by `backpropagates = True`; for others,
        joint training adds a loss of its own under the plans of the estimate.
        """


def estimator_for(router: AnyRouter, name: str, objective: Objective, options: Mapping[str, Any]) -> Estimator:
    """The named estimator, made with those of the options that it takes; layerwise routers always have "weighted".

    Raises:
        RegistryError: unknown, cannot be imported, not an estimator, cannot be made with these options, or "weighted"
            for a router without gates.
    """
    layerwise = isinstance(router, LayerwiseRouter)
    if name == "weighted" and not layerwise:
        raise RegistryError("objective.estimator=weighted trains gates, which this router lacks; choose another.")
    cls = load("weighted" if layerwise else name, ESTIMATORS)
    accepted = inspect.signature(cls).parameters
    try:
        return cls(objective, **{key: value for key, value in options.items() if key in accepted})
    except Exception as error:  # it may be anybody's
        raise RegistryError(
            f"The estimator {name!r} cannot be made ({described(error)}); its class takes an "
            "Objective, and keys of the recipe's section objective by keyword."
        ) from error


class Perturbed:
    """Perturbed plans with credit per token (perturbed optimizers, 2002.08676).

    Exact top-k of s ± σε in antithetic pairs, forward only. Each token is credited with its own objective against the
    mean over the plans tried for that token: ∂E[f]/∂s ≈ mean_p (f_p − mean f) E[ε_p | m_p] / σ. What the noise did
    shows in the plan m alone, so in place of ε stands its expectation given the plan (Rao–Blackwell), approximated
    by `NOISE_GAP` · (m − mean m), its value near the threshold: a layer that ran in every plan tried, or in none, gets
    no gradient. Gates stay hard, and the pull "more compute is better", common to all layers, is zero because the count
    is fixed.

    A part of the noise is shared by all tokens of a window: a token then reads keys and values of tokens whose plans
    changed as its own did, so that its credit includes the effect of such a change through them, and not their own
    independent noise.

    It is for exact counts. Where a budget is a mean over tokens, each would be credited for taking layers from others.

    Args:
        objective: what a plan is judged by.
        plans: M, plans tried per window; an even number.
        sigma: σ, in units of scores.
        shared: ρ in [0, 1], share of the noise's variance that is common to a window.

    Raises:
        ValueError: an odd number of plans, or none.
    """

    def __init__(self, objective: Objective, plans: int = 4, sigma: float = 0.15, shared: float = 0.75) -> None:
        if plans < 2 or plans % 2:
            raise ValueError(f"plans is {plans}; give an even number, since plans are tried in pairs")
        self.objective, self.plans, self.sigma, self.shared = objective, plans, sigma, shared

    def __call__(self, routed: RoutedLM, batch: TrainingBatch, generator: torch.Generator) -> Estimate:
        if routed.settings.competing > 1:
            raise TrainingError("Perturbed plans train for exact counts; with mean_over above 1 choose the surrogate.")
        context, dense, targets = _dense_pass(routed, batch)
        scores = scores_of(routed.router, context)
        runs = routed.plan(scores.detach(), batch.executed, batch.prompt)
        value = torch.zeros(len(batch.input_ids), device=scores.device)
        geometry, plans = routed.geometry, self.plans
        below = (batch.executed < geometry.layers).nonzero()[:, 0]  # at full depth there is only one plan
        if not len(below):
            return Estimate(scores.sum() * 0.0, value, runs, context, dense)
        with torch.no_grad():
            noise = self._noise(scores[below], generator, *batch.rows_below(geometry.layers))
            ids, executed = batch.input_ids[below].repeat(plans, 1), batch.executed[below].repeat(plans)
            tried = routed.plan((scores[below] + self.sigma * noise).flatten(0, 1), executed, batch.prompt)
            logits = routed(ids, runs=tried, logits_to_keep=batch.scored).logits.unflatten(0, (plans, -1))
            tried = tried.unflatten(0, (plans, -1))[:, :, batch.scored]
            expected, following = dense[below], targets[below]
            losses = torch.stack([self.objective(expected, each, following) for each in logits])  # (M, B, S)
            value[below] = losses.mean((0, 2))
            first = geometry.context_layer
            direction = _direction(losses, tried[..., first : first + geometry.routable], self.sigma)
        # A token that follows an earlier token's decision gives its credit to the scores of that token.
        credited = routed.held(scores, batch.prompt)[below][:, batch.scored]
        loss = (direction * credited).sum(-1).mean() * batch.weight(geometry.layers)
        return Estimate(loss, value, runs, context, dense)

    def _noise(self, scores: Tensor, generator: torch.Generator, here: Tensor, rows: int) -> Tensor:
        """(M, B, T, R) of unit variance, in antithetic pairs; `here` are the numbers of these rows among `rows`."""
        _, tokens, routable = scores.shape
        own = torch.randn(self.plans // 2, rows, tokens, routable, generator=generator)[:, here]
        common = torch.randn(self.plans // 2, rows, 1, routable, generator=generator)[:, here]
        half = (math.sqrt(1 - self.shared) * own + math.sqrt(self.shared) * common).to(scores)
        return torch.stack([half, -half], 1).flatten(0, 1)


def _direction(losses: Tensor, runs: Tensor, sigma: float) -> Tensor:
    """(B, S, R): the gradient for the scores, from losses (M, B, S) in nats and plans (M, B, S, R).

    The losses of each row are divided by their spread over plans, or deep budgets would have no weight.
    """
    credit = losses - losses.mean(0)
    credit = credit / (losses.std(0).mean(-1, keepdim=True) + 1e-6)
    runs = runs.to(credit)
    return NOISE_GAP / sigma * (credit[..., None] * (runs - runs.mean(0))).mean(0)


class StraightThrough:
    """Hard top-k forward, softmax backward (2606.09514, section 3), through a backbone that computes every layer.

    A skipped layer's gate is always pulled towards running. The softmax removes the part of this pull that is common to
    all layers of a token, which says nothing where the count is fixed.

    Args:
        objective: what a plan is judged by.
    """

    backpropagates = True

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, routed: RoutedLM, batch: TrainingBatch, generator: torch.Generator) -> Estimate:
        context, dense, targets = _dense_pass(routed, batch)
        scores = scores_of(routed.router, context)
        plan = routed.plan(scores.detach(), batch.executed, batch.prompt)
        tried = self._perturbed(scores, batch, generator)
        runs = routed.plan(tried.detach(), batch.executed, batch.prompt)
        first, last = routed.geometry.context_layer, routed.geometry.layers - 1
        sinks = routed.sink_tokens  # they run whatever the scores say
        compete = (-1,) if routed.settings.competing == 1 else (-2, -1)
        soft = self._soft(routed.held(tried, batch.prompt)[:, sinks:], runs[:, sinks:, first:last], compete)
        gates = runs.to(scores.dtype) + F.pad(soft - soft.detach(), (first, 1, sinks, 0))
        logits = routed(batch.input_ids, runs=runs, gates=gates, logits_to_keep=batch.scored).logits
        value = self.objective(dense, logits, targets)
        return Estimate(value.mean(), value.detach().mean(1), plan, context)

    def _perturbed(self, scores: Tensor, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        """(B, T, R), the scores whose plan is tried."""
        return scores

    def _soft(self, scores: Tensor, runs: Tensor, compete: tuple[int, ...]) -> Tensor:
        """(B, T, R): has the gradient that the gates of a plan take, from the scores that the plan follows.

        Args:
            scores: (B, T, R), of all tokens but sinks.
            runs: (B, T, R) bool.
            compete: dimensions in which scores compete: of a token's layers, or of a window's tokens too.
        """
        return scores.softmax(-1) * scores.shape[-1]


class Surrogate(StraightThrough):
    """The plan of perturbed scores forward, a sigmoid around its threshold backward (surrogate gradient, 1901.09948).

    A small change of the scores moves the layers near the top-k's threshold, half-way between the last score that runs
    and the first that does not. So gate i has the gradient of sigmoid((s_i + ε_i − threshold) / σ), and the noise ε, as
    wide as the sigmoid, lets other layers come near the threshold. The threshold moves with the scores such that the
    sum of the sigmoids stays: more compute for all layers is no direction. Where a budget is a mean over tokens, all
    scores of a window compete: more compute for a token is a direction, for all tokens it is none.

    Args:
        objective: what a plan is judged by.
        sigma: σ, spread of the noise and width of the sigmoid, in units of scores.
    """

    def __init__(self, objective: Objective, sigma: float = 0.15) -> None:
        super().__init__(objective)
        self.sigma = sigma

    def _perturbed(self, scores: Tensor, batch: TrainingBatch, generator: torch.Generator) -> Tensor:
        rows = len(batch.whole)
        noise = torch.randn(rows, *scores.shape[1:], generator=generator)[batch.rank :: rows // len(scores)]
        return scores + self.sigma * noise.to(scores)

    def _soft(self, scores: Tensor, runs: Tensor, compete: tuple[int, ...]) -> Tensor:
        fixed = scores.detach()
        least = fixed.masked_fill(~runs, math.inf).amin(compete, keepdim=True)
        most = fixed.masked_fill(runs, -math.inf).amax(compete, keepdim=True)
        threshold = (least + most) / 2  # infinite where all layers run, or none: no gradient
        near = ((fixed - threshold) / self.sigma).sigmoid()
        slope = near * (1 - near)
        moving = (slope * scores).sum(compete, keepdim=True) / slope.sum(compete, keepdim=True).clamp(min=1e-9)
        return ((scores - moving + (moving - threshold).detach()) / self.sigma).sigmoid()


class Weighted:
    """Back-propagation through B(h) + w · (F(h) − B(h)), w the weight of a layerwise router's gate (2410.12513).

    F is the layer, and B what a skip does: the bridge, or nothing.

    Every layer is computed on every token, whatever the cache policy. What holds the gates to a budget is the router's
    own penalty. Rows at full depth have no gates to learn. Noise that gates draw from torch's generator depends on
    the step and on the process.

    Args:
        objective: what weighted outputs are judged by.
    """

    backpropagates = True

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, routed: RoutedLM, batch: TrainingBatch, generator: torch.Generator) -> Estimate:
        router, layers = routed.router, routed.geometry.layers
        shape = batch.input_ids.shape
        runs = torch.ones(*shape, layers, dtype=torch.bool, device=batch.input_ids.device)
        value = torch.zeros(len(batch.input_ids), device=runs.device)
        below = (batch.executed < layers).nonzero()[:, 0]
        if not len(below):
            nothing = sum(parameter.sum() for parameter in router.parameters() if parameter.requires_grad) * 0.0
            return Estimate(nothing, value, runs, None)
        ids, executed = batch.input_ids[below], batch.executed[below]
        dense = DenseDistribution(routed.dense(ids, logits_to_keep=batch.scored))
        with torch.random.fork_rng([runs.device] if runs.device.type == "cuda" else []):
            torch.manual_seed(generator.initial_seed() + batch.rank)  # for routers whose gates draw noise
            options = {"executed": executed, "prompt": batch.prompt, "logits_to_keep": batch.scored}
            output = routed(ids, gate_weighted=True, **options)
        objective = self.objective(dense, output.logits, ids[:, batch.scored + 1]).mean(1)
        value[below] = objective.detach()
        is_open = output.weights.detach() > 0.5
        if routed.mean_over > 1:  # the gates alone decide
            runs[below] = F.pad(is_open, (routed.geometry.context_layer, 1), value=True)
        else:
            runs[below] = routed.plan(gate_order(is_open), executed, batch.prompt)
        loss = (objective + router.penalty(output.weights, executed)).mean() * batch.weight(layers)
        return Estimate(loss, value, runs, None)


def _dense_pass(routed: RoutedLM, batch: TrainingBatch) -> tuple[Context, DenseDistribution, Tensor]:
    """The router's context for every token, with the K asked for; the dense distribution; the next tokens (B, S)."""
    if isinstance(routed.router, LayerwiseRouter):
        name = type(routed.router).__name__
        raise TrainingError(f"{name} decides layer by layer and has no scores; train it by the weights of its gates.")
    with torch.no_grad():
        output = routed(batch.input_ids, logits_to_keep=batch.scored)
        executed = batch.executed[:, None].expand(batch.input_ids.shape)
        context = replace(output.context, executed=executed)
        return context, DenseDistribution(output.logits), batch.input_ids[:, batch.scored + 1]
