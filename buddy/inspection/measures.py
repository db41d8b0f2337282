"""The plans that ran, in numbers: who runs each layer, how often plans change, how far they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPAN = 128  # tokens among which distinct plans are counted


@dataclass(frozen=True)
class Routing:
    """The plans that ran over one text at one budget.

    Attributes:
        runs: (N, T, L) bool for N windows.
        sinks: first tokens of each window, at full depth whatever the budget; they are left out of all measures.
    """

    runs: np.ndarray
    sinks: int

    @property
    def plans(self) -> np.ndarray:
        """(N, T − sinks, L) bool, the routed tokens alone."""
        return self.runs[:, self.sinks :]


@dataclass(frozen=True)
class Measures:
    """Numbers of one text at one budget. Shares are from 0 to 1; sinks are left out of all.

    Attributes:
        tokens: routed tokens.
        executed: least, mean and most layers of a token.
        share: (L,) tokens that ran each layer, as a share.
        plans: distinct plans in the whole text.
        changes: share of tokens whose plan differs from that of the token before; None without such a token.
        apart: mean number of layers in which these two plans differ (Hamming distance); None without such a token.
        span: tokens in a stretch: 128, or the whole window where it is shorter.
        distinct: mean number of distinct plans in a stretch of `span` tokens.
        commonest: share of tokens whose plan is the text's most frequent one.
        off_commonest: share of the chosen layers (those that run and need not) which the most frequent plan of all
            texts at this budget does not run.
    """

    tokens: int
    executed: tuple[int, float, int]
    share: tuple[float, ...]
    plans: int
    changes: float | None
    apart: float | None
    span: int
    distinct: float
    commonest: float
    off_commonest: float


def measure(routing: Routing, reference: np.ndarray, always_on: int) -> Measures:
    """The numbers of a text.

    Args:
        routing: what ran, with at least one routed token.
        reference: (L,) bool, the plan that `off_commonest` holds the others against.
        always_on: layers that every plan runs.
    """
    plans = routing.plans
    executed = plans.sum(-1)
    numbers, counts = _numbered(plans)
    apart = (plans[:, 1:] != plans[:, :-1]).sum(-1)
    span, distinct = _distinct(numbers)
    chosen = int((executed - always_on).sum())
    return Measures(
        tokens=executed.size,
        executed=(int(executed.min()), float(executed.mean()), int(executed.max())),
        share=tuple(plans.mean((0, 1)).tolist()),
        plans=len(counts),
        changes=float((apart > 0).mean()) if apart.size else None,
        apart=float(apart.mean()) if apart.size else None,
        span=span,
        distinct=distinct,
        commonest=float(counts.max() / executed.size),
        off_commonest=float((plans & ~reference).sum() / chosen) if chosen else 0.0,
    )


def commonest_plan(routings: Sequence[Routing]) -> np.ndarray:
    """(L,) bool, the most frequent plan over all routed tokens; of equally frequent ones, that with later layers."""
    packed = np.concatenate([_packed(routing.plans) for routing in routings])
    distinct, counts = np.unique(packed, axis=0, return_counts=True)
    return np.unpackbits(distinct[counts.argmax()], count=routings[0].runs.shape[-1]).astype(bool)


def pooled_share(routings: Sequence[Routing]) -> np.ndarray:
    """(L,) share of the routed tokens of all texts together that ran each layer."""
    return np.concatenate([routing.plans.reshape(-1, routing.runs.shape[-1]) for routing in routings]).mean(0)


def changed_layers(runs: np.ndarray, sinks: int) -> np.ndarray:
    """(T,) layers in which each token's plan differs from that of the token before; 0 up to the first routed token.

    Args:
        runs: (T, L) bool.
        sinks: first tokens at full depth whatever the budget.
    """
    changed = np.zeros(len(runs), dtype=int)
    changed[sinks + 1 :] = (runs[sinks + 1 :] != runs[sinks:-1]).sum(-1)
    return changed


def _numbered(plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Plans (N, T, L) as numbers (N, T), equal where the plans are, and how often each occurs (P,)."""
    _, numbers, counts = np.unique(_packed(plans), axis=0, return_inverse=True, return_counts=True)
    return numbers.reshape(plans.shape[:2]), counts


def _packed(plans: np.ndarray) -> np.ndarray:
    """(N · T, bytes) uint8, a bit for each layer."""
    return np.packbits(plans.reshape(-1, plans.shape[-1]), axis=-1)


def _distinct(numbers: np.ndarray) -> tuple[int, float]:
    """Tokens in a stretch, and the mean number of distinct plans in one.

    As many stretches as cover each window (N, T), evenly spaced, so that they may overlap.
    """
    tokens = numbers.shape[1]
    span = min(SPAN, tokens)
    starts = np.linspace(0, tokens - span, -(-tokens // span)).round().astype(int)
    found = [len(np.unique(row[start : start + span])) for row in numbers for start in starts]
    return span, float(np.mean(found))
