"""Measurements for calibration: losses under many plans, similarity of hidden states, Taylor importance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import pi
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy import distributed
from buddy.backbone.load import Backbone
from buddy.engine.bridges import bridged
from buddy.engine.shared_weights import EmbeddingAndHead
from buddy.losses import DenseDistribution, cross_entropy, kl_to_dense
from buddy.router import Criterion

MAX_CACHE = 2 << 30  # bytes of hidden states that are kept between calls
MAX_DENSE = 2 << 30  # bytes of the dense model's distributions, likewise
MAX_SHARE = 0.25  # of the accelerator's free memory
Layer = Callable[..., Tensor]
Batch = tuple[int, ...]  # numbers of the windows that run together
Pair = tuple[Batch, str]  # batch, plan
Bridge = tuple[Tensor, ...]  # down (r, D), up (D, r) and bias (D,) of a skipped layer


# Similarity of hidden states


@torch.no_grad()
def similarities(backbone: Backbone, batches: Iterable[Tensor], first: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Block Influence (R,) and angular distances (R + 1, R + 1), both float32, in one pass over the windows.

    Args:
        backbone: the frozen model, outside of any budget.
        batches: windows (B, T) long.
        first: the first routable layer.
        sinks: first positions, excluded from Block Influence.
    """
    outside, routable = EmbeddingAndHead(backbone.model), backbone.num_layers - first - 1
    changes, angles = torch.zeros(routable), torch.zeros(routable + 1, routable + 1, dtype=torch.float64)
    tokens = windows = 0
    for batch in batches:
        batch = batch.to(backbone.device)
        states = _dense_states(outside, backbone.layers, batch)[first:]
        for index in range(routable):
            before, after = (state[:, sinks:].float() for state in states[index : index + 2])
            changes[index] += F.cosine_similarity(before, after, dim=-1).sum().cpu()
        last = F.normalize(torch.stack([state[:, -1] for state in states], 1).cpu().double(), dim=-1)  # (B, R + 1, D)
        angles += ((last @ last.mT).clamp(-1, 1).arccos() / pi).sum(0)
        tokens, windows = tokens + batch[:, sinks:].numel(), windows + len(batch)
    return 1 - changes / tokens, (angles / windows).triu(1).float()


# Taylor importance


def taylor_importance(backbone: Backbone, batches: Iterable[Tensor], layers: range, windows: int) -> Tensor:
    """(R,) float32: Σ |w · ∂L/∂w| over a layer's linear weights (Shortened LLaMA, 2402.02834, section 3.1).

    The parameters require gradients within this call only.

    Args:
        backbone: the frozen model, outside of any budget.
        batches: windows (B, T) long.
        layers: the routable ones.
        windows: number of windows in all batches.
    """
    weights = [[p for p in backbone.layers[index].parameters() if p.dim() == 2] for index in layers]
    parameters = [parameter for group in weights for parameter in group]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            for batch in batches:
                logits = backbone.model(batch.to(backbone.device), use_cache=False).logits
                targets = batch[:, 1:].flatten().to(logits.device)
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)
                (loss * (len(batch) / windows)).backward()
        with torch.no_grad():
            sums = [sum((p * p.grad).abs().sum(dtype=torch.float32) for p in group) for group in weights]
        # Under FSDP, full_tensor() adds up the sums of all devices.
        return torch.stack([s.full_tensor() if hasattr(s, "full_tensor") else s for s in sums]).cpu()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None


# Losses under plans. A plan is a string of L digits here, "1" for a layer that runs.


class PrefixStates:
    """Hidden states of one batch along plans that all its tokens share; common prefixes of plans run once.

    The states along the last plan are kept, so a plan costs only the layers from the first difference from the plan
    before. In lexicographic order, no prefix is computed twice.

    The first `sinks` positions run every layer. They attend only to each other, so their states are equal under every
    plan: they are computed once, and inserted before a layer that runs after a skipped one.

    Args:
        outside: the model around its layers.
        layers: the decoder layers, without an active plan.
        input_ids: (B, T) long.
        sinks: positions at full depth.
        known: states (B, T, D) after prefixes of plans, from earlier plans over the same tokens.
        wanted: prefixes of plans whose states are kept.
        bridges: of skipped layers, each by the prefix of the plan that ends with its layer.
    """

    def __init__(
        self,
        outside: EmbeddingAndHead,
        layers: Sequence[Layer],
        input_ids: Tensor,
        sinks: int,
        known: Mapping[str, Tensor],
        wanted: Collection[str],
        bridges: Mapping[str, Bridge],
    ) -> None:
        self._layers, self._wanted, self._known, self._bridges = layers, wanted, dict(known), bridges
        hidden, self._inputs = outside.embed(input_ids)
        self._sinks = _dense_states(outside, layers, input_ids[:, :sinks]) if sinks else []
        self._path = {"": hidden}  # states after the prefixes of the last plan

    @property
    def kept(self) -> dict[str, Tensor]:
        """States after the wanted prefixes that occurred."""
        return {prefix: state for prefix, state in self._known.items() if prefix in self._wanted}

    @torch.no_grad()
    def after(self, plan: str) -> Tensor:
        """The state (B, T, D) after a plan or a prefix of one; the sinks' is not valid if its last layer is skipped."""
        self._path = {prefix: state for prefix, state in self._path.items() if plan.startswith(prefix)}
        found = {**self._path, **self._known}
        done = next(count for count in range(len(plan), -1, -1) if plan[:count] in found)
        state = found[plan[:done]]
        for index in range(done, len(plan)):
            prefix = plan[: index + 1]
            state = self._path[prefix] = self._step(prefix, state)
            if prefix in self._wanted:
                self._known[prefix] = state
        return state

    def _step(self, prefix: str, hidden: Tensor) -> Tensor:
        index = len(prefix) - 1
        if prefix[-1] == "0":
            bridge = self._bridges.get(prefix)
            return hidden if bridge is None else bridged(hidden, *bridge)
        if self._sinks and prefix[-2:-1] == "0":  # after a skipped layer the sinks' states are not valid
            hidden = hidden.clone()
            hidden[:, : self._sinks[index].shape[1]] = self._sinks[index]
        return self._layers[index](hidden, **self._inputs[index])


@torch.no_grad()
def _dense_states(outside: EmbeddingAndHead, layers: Sequence[Layer], input_ids: Tensor) -> list[Tensor]:
    """The input of each layer, (B, S, D), of tokens (B, S) at full depth."""
    hidden, inputs = outside.embed(input_ids)
    states = []
    for layer, named in zip(layers, inputs, strict=True):
        states.append(hidden)
        hidden = layer(hidden, **named)
    return states


class PlanLosses:
    """Mean losses of windows under plans, in nats per token; fixed batches give a loss the same bits in every call.

    Args:
        backbone: the frozen model, outside of any budget.
        windows: (N, T) long.
        batch_size: windows in a batch.
        sinks: first positions, which run every layer.
        fit: gives the bridges for plans, each by the prefix that ends with its layer; None for no bridges.
    """

    def __init__(
        self,
        backbone: Backbone,
        windows: Tensor,
        batch_size: int,
        sinks: int,
        fit: Callable[[Iterable[str]], Mapping[str, Bridge]] | None = None,
    ) -> None:
        self._backbone, self._windows, self._sinks = backbone, windows, sinks
        self._number = -(-len(windows) // batch_size)  # of batches with all windows
        self._outside = EmbeddingAndHead(backbone.model)
        self._cache: dict[Batch, dict[str, Tensor]] = {}
        self._dense: dict[Batch, list[DenseDistribution]] = {}
        self._room, self._dense_room = (_room_for(most, backbone) for most in (MAX_CACHE, MAX_DENSE))
        self._fit = fit

    def measure(
        self, pairs: Sequence[Pair], criterion: Criterion, track: Callable[[Sequence[Pair]], Iterable[Pair]]
    ) -> Iterator[tuple[Batch, str, Tensor]]:
        """Yields for each pair its batch, its plan, and the mean loss (B,) float64 of each window, in nats per token.

        Args:
            pairs: batch by batch, the plans of each in lexicographic order, ascending or descending.
            criterion: see `buddy.router.Probe.losses`.
            track: wraps the loop over the pairs to show progress.
        """
        plans = defaultdict(list)
        for batch, plan in pairs:
            plans[batch].append(plan)
        bridges = {} if self._fit is None else self._fit({plan for _, plan in pairs})
        ce = criterion == "ce"
        measure = cross_entropy if ce else lambda logits, dense: kl_to_dense(dense, logits)
        for batch, group in groupby(track(pairs), key=itemgetter(0)):
            input_ids = self._windows[list(batch)].to(self._backbone.device)
            states = self._states_of(batch, input_ids, plans[batch], criterion, bridges)
            references = _parts(input_ids[:, 1:]) if ce else self._dense_of(batch, states)
            for _, plan in group:
                yield batch, plan, self._losses(states.after(plan), references, measure)
            self._keep(batch, states.kept)

    def _states_of(
        self, batch: Batch, input_ids: Tensor, plans: list[str], criterion: Criterion, bridges: Mapping[str, Bridge]
    ) -> PrefixStates:
        backbone, layers = self._backbone, self._backbone.num_layers
        size = input_ids.numel() * backbone.hidden_size * backbone.dtype.itemsize
        wanted = prefixes_to_keep(plans, layers, self._room // (size * self._number))
        if criterion == "kl":
            wanted.add("1" * layers)  # every call needs the dense model's output
        known = self._cache.get(batch, {})
        return PrefixStates(self._outside, backbone.layers, input_ids, self._sinks, known, wanted, bridges)

    def _keep(self, batch: Batch, states: dict[str, Tensor]) -> None:
        """Keep states for later plans over the batch; drop the oldest batch where there are too many."""
        self._cache.pop(batch, None)
        self._cache[batch] = states
        if len(self._cache) > self._number:
            del self._cache[next(iter(self._cache))]

    @torch.no_grad()
    def _dense_of(self, batch: Batch, states: PrefixStates) -> list[DenseDistribution]:
        """The dense model's distributions for each group of tokens, kept for later calls while there is room.

        A search has many calls for few plans each, and one distribution takes as long as the loss of a plan.
        """
        if batch in self._dense:
            return self._dense[batch]
        dense = states.after("1" * self._backbone.num_layers)
        found = [DenseDistribution(self._outside.logits(part)) for part in _parts(dense[:, :-1])]
        size = sum(each.probability.nbytes for each in found)
        if size <= self._dense_room:
            self._dense_room -= size
            self._dense[batch] = found
        return found

    @torch.no_grad()
    def _losses(self, states: Tensor, references: Sequence[Any], measure: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """Each window's loss, (B,) float64, from the last layer's output (B, T, D).

        Logits are computed for a few tokens at a time: all of them would be large, and on a CPU a few are faster.
        """
        parts = zip(_parts(states[:, :-1]), references, strict=True)
        tokens = torch.cat([measure(self._outside.logits(part), reference) for part, reference in parts])
        return tokens.view(len(states), -1).cpu().double().mean(1)


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """(B, T, …) split into groups of tokens (N, …)."""
    return x.flatten(0, 1).split(256 if x.device.type == "cpu" else 2048)


def prefixes_to_keep(plans: Collection[str], layers: int, room: int) -> set[str]:
    """At most `room` prefixes of plans, at as many evenly spaced layers as fit.

    A greedy search measures in each round plans with prefixes of the round before, and resumes from the kept states.

    Args:
        plans: L digits each.
        layers: L.
        room: number of states that fit.
    """
    for count in range(layers - 1, 0, -1):
        ends = {round(layers * number / (count + 1)) for number in range(1, count + 1)}
        prefixes = {plan[:end] for plan in plans for end in ends}
        if len(prefixes) <= room:
            return prefixes
    return set()


def _room_for(most: int, backbone: Backbone) -> int:
    """Bytes to keep on the backbone's device between calls: `most`, or less on an accelerator that is nearly full.

    Under sharding all processes have the same room: what is kept decides which layers are called.
    """
    device = backbone.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    room = most if free is None else min(most, int(free * MAX_SHARE))
    return distributed.least(room) if backbone.sharded else room
