"""What ran: noted by the layers as they run, spelt out in tensors only when asked."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from buddy.router import Context


@dataclass
class Ran:
    """What one forward planned and ran.

    Attributes:
        shape: (B, T).
        layers: L.
        device: of the tensors that are asked for.
        plan: (B, T, L) bool, or L lists of B for one new token a row, or None where every layer ran.
        sink: (B, T) bool, positions at full depth whatever the budget; None for none.
        whole: layers that recorded every token.
        parts: (B, T) bool of each layer that recorded some tokens.
    """

    shape: tuple[int, int]
    layers: int
    device: torch.device
    plan: Tensor | list[list[bool]] | None
    sink: Tensor | None
    whole: int = 0
    parts: list[Tensor] = field(default_factory=list)

    @property
    def executed(self) -> Tensor:
        """(B, T) long, the layers that each token ran, as the layers themselves recorded it."""
        total = torch.full(self.shape, self.whole, dtype=torch.long, device=self.device)
        for part in self.parts:
            total += part
        return total

    @property
    def runs(self) -> Tensor:
        """(B, T, L) bool, the plan with sinks at full depth."""
        if isinstance(self.plan, Tensor):
            return self.plan
        if self.plan is None:
            return torch.ones(*self.shape, self.layers, dtype=torch.bool, device=self.device)
        return torch.tensor(self.plan, device=self.device).t()[:, None]

    @property
    def sinks(self) -> Tensor:
        """(B, T) bool, positions at full depth whatever the budget."""
        return torch.zeros(self.shape, dtype=torch.bool, device=self.device) if self.sink is None else self.sink


@dataclass
class Record:
    """What ran while a request held, one entry a forward.

    Attributes:
        asked: K for each row, where a budget predictor chose it last.
    """

    forwards: list[Ran] = field(default_factory=list)
    asked: tuple[int, ...] = ()

    @property
    def executed(self) -> list[Tensor]:
        """(B, T) long each: layers that each token really ran."""
        return [ran.executed for ran in self.forwards]

    @property
    def sinks(self) -> list[Tensor]:
        """(B, T) bool each: positions at full depth whatever the budget."""
        return [ran.sinks for ran in self.forwards]

    @property
    def runs(self) -> list[Tensor]:
        """(B, T, L) bool each: the plans, sinks at full depth."""
        return [ran.runs for ran in self.forwards]


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
        weights: (B, T, R) with gradients, those of the routable layers; of a weighted forward only.
    """

    logits: Tensor
    context: Context
    scores: Tensor | None
    runs: Tensor
    executed: Tensor
    sinks: Tensor
    weights: Tensor | None = None
