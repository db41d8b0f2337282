"""Many plans on one batch of windows, each layer run once for every distinct beginning of a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from buddy.calibration.shell import Shell

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
