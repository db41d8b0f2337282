"""Scores → a plan of exactly K executed layers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from buddy.errors import BudgetError


def top_k(scores: Tensor, k: Tensor) -> Tensor:
    """Exactly k of R layers for each score vector, ties broken by the lower layer index.

    Args:
        scores: (..., R), larger = more worth running. Must be finite.
        k: (...) long, broadcast against the leading dimensions of `scores`, 0 ≤ k ≤ R.

    Returns:
        (..., R) bool with exactly k true in the last dimension.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    return rank < k.unsqueeze(-1)


def gate_order(open_gates: Tensor) -> Tensor:
    """Scores whose top k are the layers that gates run when they are asked one after the other and held to a count.

    A layer runs where its gate is open until k are spent, and whatever its gate says where as many layers are left as
    are owed. So open gates come first, the earlier before the later; then closed ones, the later before the earlier.

    Args:
        open_gates: (..., R) bool.

    Returns:
        (..., R) float32; those of open gates are at least R, those of closed ones below it.
    """
    routable = open_gates.shape[-1]
    index = torch.arange(routable, dtype=torch.float32, device=open_gates.device)
    return torch.where(open_gates, 2 * routable - index, index)


@dataclass(frozen=True)
class Plan:
    """Which layers run for which token.

    Attributes:
        runs: (..., L) bool over all layers of the backbone, always-on layers included.
    """

    runs: Tensor

    @classmethod
    def from_scores(cls, scores: Tensor, executed: Tensor, layers: int) -> "Plan":
        """The plan that runs exactly `executed` layers: the first L − R − 1, the last, and the best-scored between.

        Args:
            scores: (..., R).
            executed: (...) long, broadcast against the leading dimensions; K with always-on layers included.
            layers: L.

        Raises:
            BudgetError: K is below the always-on layers or above L.
        """
        routable = scores.shape[-1]
        first = layers - routable - 1
        k = executed - (first + 1)
        if bool(((k < 0) | (k > routable)).any()):
            raise BudgetError(f"A plan runs from {first + 1} to {layers} layers; {executed.tolist()} were asked for.")
        runs = torch.ones(*scores.shape[:-1], layers, dtype=torch.bool, device=scores.device)
        runs[..., first : first + routable] = top_k(scores, k)
        return cls(runs)

    @property
    def executed(self) -> Tensor:
        """(...) long, the number of layers that run."""
        return self.runs.sum(-1)
