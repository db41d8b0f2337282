"""What routers are calibrated by: losses of many plans, similarity of hidden states, Taylor importance."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import pi
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.backbone.load import Backbone
from buddy.calibration.shell import Shell
from buddy.losses import Dense, cross_entropy, kl_to_dense


@torch.no_grad()
def similarities(backbone: Backbone, batches: Iterable[Tensor], first: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Block Influence (R,) and angular distances (R + 1, R + 1), both float32, in one pass over the windows.

    Args:
        backbone: no pass is under way in its layers.
        batches: windows (B, T) long.
        first: the first routable layer.
        sinks: first positions that Block Influence leaves out.
    """
    routable = backbone.num_layers - first - 1
    changes, angles = torch.zeros(routable), torch.zeros(routable + 1, routable + 1, dtype=torch.float64)
    tokens = windows = 0
    for batch in batches:
        batch = batch.to(backbone.device)
        with _entering(backbone, range(first, first + routable + 1)) as states:
            backbone.base(batch, use_cache=False)
        for index in range(routable):
            before, after = (state[:, sinks:].float() for state in states[index : index + 2])
            changes[index] += F.cosine_similarity(before, after, dim=-1).sum().cpu()
        angles += _angles(torch.stack([state[:, -1] for state in states], 1).cpu().double()).sum(0)
        tokens, windows = tokens + batch[:, sinks:].numel(), windows + len(batch)
    return 1 - changes / tokens, (angles / windows).triu(1).float()


def _angles(states: Tensor) -> Tensor:
    """(B, S, S), arccos(cos) / π between every two of states (B, S, D)."""
    unit = F.normalize(states, dim=-1)
    return (unit @ unit.mT).clamp(-1, 1).arccos() / pi


@contextmanager
def _entering(backbone: Backbone, layers: Iterable[int]) -> Iterator[list[Tensor]]:
    """The hidden states (B, T, D) that enter some layers, rising, during one forward within this block."""
    states: list[Tensor] = []
    hooks = [backbone.layers[i].register_forward_pre_hook(lambda _, args: states.append(args[0])) for i in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def importance(backbone: Backbone, batches: Iterable[Tensor], layers: range, windows: int) -> Tensor:
    """(R,) float32: Σ |w · ∂L/∂w| over a layer's linear weights (Shortened LLaMA, 2402.02834, section 3.1).

    Args:
        backbone: no pass is under way in its layers.
        batches: windows (B, T) long.
        layers: the routable ones.
        windows: how many there are.
    """
    weights = [[p for p in backbone.layers[index].parameters() if p.dim() == 2] for index in layers]
    with _with_gradients([parameter for group in weights for parameter in group]), torch.enable_grad():
        for batch in batches:
            (_cross_entropy(backbone.model, batch.to(backbone.device)) * (len(batch) / windows)).backward()
        sums = [_of_all(sum((p * p.grad).abs().sum(dtype=torch.float32) for p in group)) for group in weights]
        return torch.stack(sums).detach().cpu()


def _of_all(total: Tensor) -> Tensor:
    """The sum over all devices, where they share the weights out."""
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def _cross_entropy(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


@contextmanager
def _with_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Frozen parameters get gradients within this block, and are frozen again after it."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None


MOST = 2 << 30  # bytes
SHARE = 0.25  # of the memory


def worth_keeping(plans: Collection[str], layers: int, room: int) -> set[str]:
    """At most `room` beginnings of plans, at evenly spaced layers, as densely as they fit.

    Args:
        plans: L letters each.
        layers: L.
        room: how many states may be kept.
    """
    for count in range(layers - 1, 0, -1):
        ends = {round(layers * place / (count + 1)) for place in range(1, count + 1)}
        kept = {plan[:end] for plan in plans for end in ends}
        if len(kept) <= room:
            return kept
    return set()


def room_for(size: int, device: torch.device, batches: int) -> int:
    """How many states of `size` bytes may be kept for each batch."""
    return min(MOST, int(_memory(device) * SHARE)) // (size * batches)


def _memory(device: torch.device) -> int:
    """Bytes: what is free on an accelerator of its own, else all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return MOST


Layer = Callable[..., Tensor]


class State(NamedTuple):
    """A hidden state after some layers.

    Attributes:
        hidden: (B, T, D).
        whole: whether the sinks in it are up to date; they are not where the last layer was skipped.
    """

    hidden: Tensor
    whole: bool


class Walk:
    """Hidden states of one batch along plans that hold for all its tokens.

    A plan is a text of L letters, "1" where a layer runs. The states of the last plan are at hand, so a plan costs only
    the layers from the first one where it differs from the plan before. Asked in lexicographic order, no beginning of a
    plan is computed twice.

    The first `sinks` positions run every layer. They attend to each other only, so their states are the same under
    every plan: they are computed once, and laid over the others' where a layer runs after one that was skipped.

    Args:
        shell: the model around its layers.
        layers: the decoder layers, stock or with no pass under way.
        input_ids: (B, T) long.
        sinks: positions at full depth.
        known: states after beginnings of plans, from an earlier walk over the same tokens.
        wanted: beginnings of plans to keep.

    Attributes:
        kept: states after those wanted beginnings that were met.
    """

    def __init__(
        self,
        shell: Shell,
        layers: Sequence[Layer],
        input_ids: Tensor,
        sinks: int,
        known: Mapping[str, State] | None = None,
        wanted: Collection[str] = (),
    ) -> None:
        self._layers, self._known, self._wanted = layers, known or {}, wanted
        self.kept = {start: state for start, state in self._known.items() if start in wanted}
        hidden, self._inputs = shell.enter(input_ids)
        self._sinks = _states(shell, layers, input_ids[:, :sinks]) if sinks else []
        self._plan, self._path = "", {0: State(hidden, True)}  # by the number of layers behind them

    @torch.no_grad()
    def last(self, plan: str) -> Tensor:
        """What leaves the last layer, (B, T, D), under a plan that runs the last layer."""
        shared = next((i for i, (a, b) in enumerate(zip(plan, self._plan, strict=False)) if a != b), len(self._plan))
        self._path = {done: state for done, state in self._path.items() if done <= shared}
        first = self._resume(plan, max(self._path))
        for index in range(first, len(plan)):
            state = self._path[index + 1] = self._step(index, self._path[index], plan[index] == "1")
            if plan[: index + 1] in self._wanted:
                self.kept[plan[: index + 1]] = state
        self._plan = plan
        return self._path[len(plan)].hidden

    def dense(self) -> Tensor:
        """What leaves the last layer where all run, (B, T, D)."""
        return self.last("1" * len(self._layers))

    def _resume(self, plan: str, done: int) -> int:
        """The most layers of the plan that are done, `done` of them by the plan before."""
        for longer in range(len(plan), done, -1):
            state = self.kept.get(plan[:longer]) or self._known.get(plan[:longer])
            if state is not None:
                self._path[longer] = state
                return longer
        return done

    def _step(self, index: int, state: State, runs: bool) -> State:
        hidden = state.hidden
        if not runs:
            return State(hidden, not self._sinks)
        if not state.whole:
            hidden = hidden.clone()
            hidden[:, : self._sinks[index].shape[1]] = self._sinks[index]
        return State(self._layers[index](hidden, **self._inputs[index]), True)


@torch.no_grad()
def _states(shell: Shell, layers: Sequence[Layer], input_ids: Tensor) -> list[Tensor]:
    """What enters each layer, (B, S, D), where the tokens (B, S) run them all."""
    hidden, inputs = shell.enter(input_ids)
    states = []
    for layer, named in zip(layers, inputs, strict=True):
        states.append(hidden)
        hidden = layer(hidden, **named)
    return states


Criterion = Literal["ce", "kl"]
CRITERIA = ("ce", "kl")
Judge = Callable[[Tensor], Tensor]


def judge(criterion: Criterion, shell: Shell, input_ids: Tensor, walk: Walk) -> Judge:
    """A function from states (B, T, D) that leave the last layer to each window's loss, (B,) float64.

    Logits are made for a few tokens at a time and forgotten at once: all of them would be the largest thing in memory,
    and on a CPU it is quicker.

    Args:
        criterion: "ce", next-token cross-entropy, or "kl", KL(dense ‖ plan); both in nats, the mean over positions
            0 … T − 2.
        shell: the model around its layers.
        input_ids: (B, T) long.
        walk: over these tokens, for the states of the dense model.
    """
    if criterion == "ce":
        facts: Sequence[Any] = _parts(input_ids[:, 1:])
        measure: Callable[[Tensor, Any], Tensor] = cross_entropy
    else:
        facts = [Dense(shell.leave(part)) for part in _parts(walk.dense()[:, :-1])]

        def measure(logits: Tensor, fact: Any) -> Tensor:
            return kl_to_dense(fact, logits)

    @torch.no_grad()
    def losses(states: Tensor) -> Tensor:
        parts = zip(_parts(states[:, :-1]), facts, strict=True)
        tokens = torch.cat([measure(shell.leave(part), fact) for part, fact in parts])
        return tokens.view(len(states), -1).cpu().double().mean(1)

    return losses


def _parts(x: Tensor) -> tuple[Tensor, ...]:
    """(B, T, …) as tokens, some at a time."""
    return x.flatten(0, 1).split(256 if x.device.type == "cpu" else 2048)


Batch = int | tuple[int, ...]  # number of a batch, or of the windows in one of its own
Pair = tuple[Batch, str]  # batch, plan


class Losses:
    """Measures windows in fixed batches, so that what is known already never changes the rounding of the rest.

    Args:
        backbone: no pass is under way in its layers.
        batches: windows (B, T) long each.
        sinks: first positions that run every layer.
    """

    def __init__(self, backbone: Backbone, batches: Sequence[Tensor], sinks: int) -> None:
        self._backbone, self._batches, self._sinks = backbone, batches, sinks
        self._shell = Shell(backbone.model)
        self._kept: dict[Batch, dict[str, State]] = {}

    def measure(
        self, pairs: Sequence[Pair], criterion: Criterion, track: Callable[[Sequence[Pair]], Iterable[Pair]]
    ) -> Iterator[tuple[Batch, str, Tensor]]:
        """Batch, plan, and the losses (B,) float64 of its windows, one pair after the other.

        Args:
            pairs: batch by batch, the plans of each in lexicographic order, rising or falling.
            criterion: see `judge`.
            track: wraps the loop over the pairs.
        """
        plans = defaultdict(list)
        for number, plan in pairs:
            plans[number].append(plan)
        current = None
        for number, plan in track(pairs):
            if number != current:
                current, batch = number, self._tokens(number).to(self._backbone.device)
                walk = self._walk(number, batch, plans[number], criterion)
                losses = judge(criterion, self._shell, batch, walk)
            yield number, plan, losses(walk.last(plan))
            self._keep(number, walk.kept)

    def release(self) -> None:
        """Forget the hidden states that wait for another call."""
        self._kept = {}

    def _tokens(self, batch: Batch) -> Tensor:
        """(B, T) long."""
        if isinstance(batch, int):
            return self._batches[batch]
        size = len(self._batches[0])
        return torch.stack([self._batches[window // size][window % size] for window in batch])

    def _keep(self, batch: Batch, states: dict[str, State]) -> None:
        """Keep states for a later walk over the batch; where windows came in other batches too, the oldest go."""
        self._kept.pop(batch, None)
        self._kept[batch] = states
        while len(self._kept) > len(self._batches):
            del self._kept[next(iter(self._kept))]

    def _walk(self, number: Batch, batch: Tensor, plans: list[str], criterion: Criterion) -> Walk:
        """A walk over a batch that begins where an earlier one left something."""
        backbone, layers = self._backbone, self._backbone.num_layers
        size = batch.numel() * backbone.hidden_size * backbone.dtype.itemsize
        wanted = worth_keeping(plans, layers, room_for(size, backbone.device, len(self._batches)))
        if criterion == "kl":
            wanted.add("1" * layers)  # the dense model's last states, which every call needs
        return Walk(self._shell, backbone.layers, batch, self._sinks, self._kept.get(number), wanted)
