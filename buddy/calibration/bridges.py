"""Bridges in closed form: ridge regression, layer after layer, towards the dense model's states. No gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from buddy.calibration.measures import Bridge, PrefixStates
from buddy.engine.bridges import Bridges, bridge_input
from buddy.engine.model import RoutedLM
from buddy.engine.shared_weights import EmbeddingAndHead

BATCH = 4  # windows of `PlanBridges` that pass a layer together
BIAS_PENALTY = 1e-6  # so small that the bias is not shrunk
TINY = 1e-6  # against a division by 0


@torch.no_grad()
def fit_bridges(
    model: RoutedLM,
    windows: Tensor,
    executed: Sequence[int],
    *,
    rank: int,
    ridge: float,
    prompt: int = 0,
    batch_size: int = 4,
    track: Callable[[Sequence[Any], str], Iterable[Any]] = lambda items, _: items,
) -> Bridges:
    """Bridges for the plans of a model's router, one set for all budgets.

    Layer after layer, on the states that the routed model reaches with the bridges before, the bridge of a layer is
    fitted from the state that skips it to the dense model's state after it, by ridge regression; then it is cut to the
    directions in which it acts most. A layer that fewer than D tokens skip is fitted on all tokens: a router may skip
    it after training, or at another budget. With fewer than D tokens in all there are no bridges.

    Tokens that skip a layer write its keys and values as under the cache policy `fill`, whatever the model's policy is.

    Args:
        model: with its router calibrated or trained. Bridges that it has are in place while its router plans.
        windows: (N, T) long.
        executed: K of the budgets below full depth; every window is used at each.
        rank: r, from 1 to D.
        ridge: penalty of squared weights, in units of the variance of a bridge's input.
        prompt: first tokens of a window, its prompt.
        batch_size: windows per forward.
        track: wraps the loops over batches and layers to show progress, given their items and a description.
    """
    batches = [batch.to(model.backbone.device) for batch in windows.split(batch_size)]
    training = model.router.training
    model.router.eval()  # plans as they will be served
    with model.changed(batch_plan="row"):  # these windows have nothing in common
        plans = [
            [model(ids, executed=ids.new_full((len(ids),), k), prompt=prompt, logits_to_keep=1).runs for k in executed]
            for ids in track(batches, "Plans for bridges")
        ]
    model.router.train(training)
    backbone, geometry = model.backbone, model.geometry
    bridges, outside = Bridges(geometry, rank).to(backbone.device), EmbeddingAndHead(backbone.model)
    embedded = [outside.embed(ids) for ids in batches]
    dense = [hidden for hidden, _ in embedded]
    routed = [(number, plan, dense[number]) for number, group in enumerate(plans) for plan in group]
    whole = _without_sinks(batches, model.sink_tokens)
    everywhere = [whole[number] for number, _, _ in routed]
    for index in track(range(geometry.layers - 1), "Fitting bridges"):
        layer = backbone.layers[index]
        calls = [inputs[index] for _, inputs in embedded]
        with model.stock():
            dense = [layer(hidden, **call) for hidden, call in zip(dense, calls, strict=True)]
        if index < geometry.context_layer:
            routed = [(number, plan, dense[number]) for number, plan, _ in routed]
            continue
        for tokens in ([~plan[..., index] for _, plan, _ in routed], everywhere):
            if sum(int(each.sum()) for each in tokens) >= geometry.hidden:
                states, targets = [hidden for _, _, hidden in routed], [dense[number] for number, _, _ in routed]
                bridges.set(index, *_regression(states, targets, tokens, rank, ridge))
                break
        routed = [
            (
                number,
                plan,
                torch.where(plan[..., index, None], layer(hidden, **calls[number]), bridges(index, hidden)),
            )
            for number, plan, hidden in routed
        ]
    return bridges


class PlanBridges:
    """Bridges for plans that all tokens share, as `fit_bridges` fits them; equal beginnings of plans share theirs.

    Args:
        model: without an adapter; its router and its bridges are not used.
        windows: (N, T) long; sinks run every layer.
        rank, ridge: as for `fit_bridges`.
    """

    def __init__(self, model: RoutedLM, windows: Tensor, *, rank: int, ridge: float) -> None:
        backbone, sinks = model.backbone, model.sink_tokens
        self._rank, self._ridge = rank, ridge
        self._fitted: dict[str, Bridge] = {}
        batches = [batch.to(backbone.device) for batch in windows.split(BATCH)]
        outside = EmbeddingAndHead(backbone.model)
        self._states = [PrefixStates(outside, backbone.layers, ids, sinks, {}, (), self._fitted) for ids in batches]
        self._chosen = _without_sinks(batches, sinks)
        self._enough = sum(int(each.sum()) for each in self._chosen) >= model.geometry.hidden
        # After each layer of the dense model, one state a batch.
        self._dense = [[each.after("1" * count) for each in self._states] for count in range(1, backbone.num_layers)]

    @torch.no_grad()
    def fit(self, plans: Iterable[str]) -> dict[str, Bridge]:
        """The bridge of each skipped layer, by the beginning of its plan up to and with this layer.

        Args:
            plans: L digits each, "1" for a layer that runs.
        """
        plans = sorted(plans)  # in this order equal beginnings are computed once
        ends = {plan[: index + 1] for plan in plans for index, digit in enumerate(plan) if digit == "0"}
        for prefix in self._fitted.keys() - ends:
            del self._fitted[prefix]
        for prefix in sorted(ends - self._fitted.keys()) if self._enough else ():
            before = [each.after(prefix[:-1]) for each in self._states]
            parts = _regression(before, self._dense[len(prefix) - 1], self._chosen, self._rank, self._ridge)
            self._fitted[prefix] = tuple(part.to(before[0].dtype) for part in parts)
        return dict(self._fitted)


def _without_sinks(batches: Sequence[Tensor], sinks: int) -> list[Tensor]:
    """Of batches of windows (B, T), which tokens (B, T) are not sinks."""
    return [torch.arange(ids.shape[1], device=ids.device).expand_as(ids) >= sinks for ids in batches]


def _regression(
    states: Sequence[Tensor], targets: Sequence[Tensor], chosen: Sequence[Tensor], rank: int, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(down (r, D), up (D, r), bias (D,)) from the states (B, T, D) of chosen tokens (B, T) to their targets.

    A token weighs one over the norm of its target, so that the few tokens whose states are many times larger than the
    others' count less: layers read normalised states.
    """
    gram: Any = 0.0
    cross: Any = 0.0
    for state, target, which in zip(states, targets, chosen, strict=True):
        before, wanted = state[which].float(), (target[which].float() - state[which].float())
        importance = target[which].float().square().mean(1, keepdim=True).clamp_min(TINY).rsqrt()
        x = torch.cat([bridge_input(before), before.new_ones(len(before), 1)], 1)
        weighted = (importance * x).T
        gram, cross = gram + (weighted @ x).cpu().double(), cross + (weighted @ wanted).cpu().double()
    total, width = gram[-1, -1], len(gram) - 1
    penalty = (ridge * total).repeat(width + 1)
    penalty[-1] = BIAS_PENALTY * total
    solution = torch.linalg.solve(gram + penalty.diag(), cross)
    weight, bias, mean = solution[:-1], solution[-1], gram[-1, :-1] / total
    spread = weight.T @ (gram[:-1, :-1] - total * mean.outer(mean)) @ weight  # of what the bridge adds
    up = torch.linalg.eigh(spread).eigenvectors[:, -rank:]
    added = mean @ weight
    parts = (weight @ up).T, up, bias + added - up @ (up.T @ added)
    return tuple(part.float().to(states[0].device) for part in parts)
