"""What a forward planned and ran, and what one over whole windows gives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from buddy.engine.transfer import to_device
from buddy.router import Context


@dataclass
class ForwardRecord:
    """What one forward planned and ran; tensors are made only when asked for.

    Attributes:
        shape: (B, T).
        layers: L.
        device: of the tensors.
        plan: (B, T, L) bool, or L lists of B for one new token a row, or None where every layer ran.
        sink_mask: (B, T) bool, positions at full depth whatever the budget; None for none.
        full_layers: number of layers that ran on every token.
        partial_layers: (B, T), the tokens that ran, of each layer that ran on some; or counts of several such layers.
    """

    shape: tuple[int, int]
    layers: int
    device: torch.device
    plan: Tensor | list[list[bool]] | None
    sink_mask: Tensor | None
    full_layers: int
    partial_layers: list[Tensor]

    @property
    def executed(self) -> Tensor:
        """(B, T) long, the number of layers that each token ran, as counted by the layers themselves."""
        total = torch.full(self.shape, self.full_layers, dtype=torch.long, device=self.device)
        for ran in self.partial_layers:
            total += ran
        return total

    @property
    def runs(self) -> Tensor:
        """(B, T, L) bool, the plan with sinks at full depth."""
        if isinstance(self.plan, Tensor):
            return self.plan
        if self.plan is None:
            return torch.ones(*self.shape, self.layers, dtype=torch.bool, device=self.device)
        return to_device(self.plan, self.device).t()[:, None]

    @property
    def sinks(self) -> Tensor:
        """(B, T) bool, positions at full depth whatever the budget."""
        none = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        return none if self.sink_mask is None else self.sink_mask

    def row(self, index: int) -> ForwardRecord:
        """The record of one row of the batch."""
        one = slice(index, index + 1)
        plan = self.plan[one] if isinstance(self.plan, Tensor) else self.plan and [layer[one] for layer in self.plan]
        sinks = None if self.sink_mask is None else self.sink_mask[one]
        partial = [ran[one] for ran in self.partial_layers]
        return replace(self, shape=(1, self.shape[1]), plan=plan, sink_mask=sinks, partial_layers=partial)


@dataclass
class Record:
    """What ran within one `at` block.

    Attributes:
        forwards: one entry for each forward.
    """

    forwards: list[ForwardRecord] = field(default_factory=list)

    @property
    def executed(self) -> list[Tensor]:
        """For each forward (B, T) long, the number of layers that each token ran."""
        return [forward.executed for forward in self.forwards]

    @property
    def sinks(self) -> list[Tensor]:
        """For each forward (B, T) bool, positions at full depth whatever the budget."""
        return [forward.sinks for forward in self.forwards]

    @property
    def runs(self) -> list[Tensor]:
        """For each forward (B, T, L) bool, the plan with sinks at full depth."""
        return [forward.runs for forward in self.forwards]


@dataclass(frozen=True)
class Output:
    """Result of a routed forward over whole windows.

    Attributes:
        logits: (B, T', V) of the positions kept.
        context: what the router saw, leading dimensions (B, T).
        scores: (B, T, R), or None where the router was not asked, or is layerwise.
        runs: (B, T, L) bool, the plan with sinks at full depth.
        executed: (B, T) long, layers that really ran.
        sinks: (B, T) bool, positions at full depth whatever the budget.
        weights: (B, T, R) with gradients, those of the routable layers; of a gate-weighted forward only.
    """

    logits: Tensor
    context: Context
    scores: Tensor | None
    runs: Tensor
    executed: Tensor
    sinks: Tensor
    weights: Tensor | None = None
