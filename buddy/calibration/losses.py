"""Losses of batches of windows under plans, with as little work as the plans allow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from buddy.backbone import Backbone
from buddy.calibration.criteria import Criterion, judge
from buddy.calibration.prefixes import room_for, worth_keeping
from buddy.calibration.shell import Shell
from buddy.calibration.walk import State, Walk

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
