"""What a plan is judged by, from the states that leave the last layer: cross-entropy, or KL to the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from buddy.calibration.shell import Shell
from buddy.calibration.walk import Walk
from buddy.losses import Dense, cross_entropy, kl_to_dense

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
