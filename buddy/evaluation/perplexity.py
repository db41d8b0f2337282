"""Perplexity and KL to the dense model per budget, by the causal protocol.

Each window has a prompt, which is read and not scored, and a continuation in which every token is routed on its own
prefix. Sums are kept per document, so that intervals and paired differences resample documents, not tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buddy.engine.model import RoutedLM
from buddy.evaluation.reference import Reference
from buddy.training.objective import Dense, cross_entropy, kl_to_dense
from buddy.training.windows import Windows

RESAMPLES = 2000
Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Scores:
    """What one router did at one budget.

    Attributes:
        budget: as asked.
        layers: K, executed layers that the budget stands for.
        executed: least, mean and most layers that tokens really ran, prompts included and sinks left out.
        sinks: tokens per window at full depth whatever the budget.
        loss: (documents,) summed next-token cross-entropy in nats.
        kl: (documents,) summed KL to the dense model in nats.
        tokens: (documents,) scored tokens.
    """

    budget: float
    layers: int
    executed: tuple[int, float, int]
    sinks: int
    loss: np.ndarray
    kl: np.ndarray
    tokens: np.ndarray

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy over all tokens."""
        return math.exp(self.loss.sum() / self.tokens.sum())

    @property
    def mean_kl(self) -> float:
        """Mean KL to the dense model in nats a token."""
        return float(self.kl.sum() / self.tokens.sum())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the perplexity over documents (percentile method)."""
        drawn = resamples(len(self.tokens))
        return quantiles(np.exp(self.loss[drawn].sum(1) / self.tokens[drawn].sum(1)), level)


def paired_difference(ours: Scores, theirs: Scores, level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """Difference of mean cross-entropy (ours − theirs, nats a token) on the same documents, and its interval.

    Every resample draws documents once and takes both routers' losses on them.
    """
    difference = ours.loss - theirs.loss
    drawn = resamples(len(difference))
    estimates = difference[drawn].sum(1) / ours.tokens[drawn].sum(1)
    return float(difference.sum() / ours.tokens.sum()), quantiles(estimates, level)


@torch.no_grad()
def evaluate(
    routed: RoutedLM,
    windows: Windows,
    budgets: Sequence[float],
    *,
    prompt: int,
    batch_size: int = 4,
    track: Track = iter,
    reference: Reference | None = None,
) -> list[Scores]:
    """Scores of the model's router at each budget.

    Args:
        routed: model and router.
        windows: held-out text.
        budgets: fractions; each becomes K layers.
        prompt: tokens of each window that are not scored.
        batch_size: windows per forward.
        track: wraps the list of batches to show progress.
        reference: keeps what all routers share, where several are evaluated on the same windows in the same way.
    """
    layers = [routed.executed_layers(budget) for budget in budgets]
    reference = Reference(most=0) if reference is None else reference
    full = {routed.geometry.layers: reference.full} if reference.full else {}
    tallies = {count: _Tally(windows) for count in layers if count not in full}
    scored = torch.arange(prompt - 1, windows.input_ids.shape[1] - 1, device=routed.backbone.device)
    for rows in track(torch.arange(len(windows)).split(batch_size)) if tallies else ():
        ids = windows.input_ids[rows].to(routed.backbone.device)
        dense = Dense(reference.dense(routed.backbone, int(rows[0]), ids, scored))
        for count, tally in tallies.items():
            output = routed(ids, executed=torch.full((len(ids),), count), prompt=prompt, keep=scored)
            tally.add(rows, cross_entropy(output.logits, ids[:, scored + 1]), kl_to_dense(dense, output.logits))
            tally.count(output.executed[~output.sinks], int(output.sinks[0].sum()))
    found = full | {count: tally.scores(count) for count, tally in tallies.items()}
    reference.full = found.get(routed.geometry.layers)
    return [replace(found[count], budget=budget) for budget, count in zip(budgets, layers, strict=True)]


class _Tally:
    """Sums per document."""

    def __init__(self, windows: Windows) -> None:
        documents = windows.documents.unique()
        self._place = {int(d): i for i, d in enumerate(documents)}
        self._documents = windows.documents
        self._loss, self._kl, self._tokens = (np.zeros(len(documents)) for _ in range(3))
        self._least, self._most, self._sum, self._n, self._sinks = math.inf, 0, 0, 0, 0

    def add(self, rows: Tensor, loss: Tensor, kl: Tensor) -> None:
        for row, row_loss, row_kl in zip(rows, loss.cpu(), kl.cpu(), strict=True):
            place = self._place[int(self._documents[row])]
            self._loss[place] += row_loss.sum(dtype=torch.float64).item()
            self._kl[place] += row_kl.sum(dtype=torch.float64).item()
            self._tokens[place] += row_loss.numel()

    def count(self, executed: Tensor, sinks: int) -> None:
        self._least, self._most = min(self._least, int(executed.min())), max(self._most, int(executed.max()))
        self._sum, self._n, self._sinks = self._sum + int(executed.sum()), self._n + executed.numel(), sinks

    def scores(self, layers: int) -> Scores:
        executed = (int(self._least), self._sum / self._n, self._most)
        return Scores(1.0, layers, executed, self._sinks, self._loss, self._kl, self._tokens)


def resamples(documents: int) -> np.ndarray:
    """(RESAMPLES, documents) indices, the same for every router so that differences are paired."""
    return np.random.default_rng(0).integers(documents, size=(RESAMPLES, documents))


def quantiles(values: np.ndarray, level: float) -> tuple[float, float]:
    """The bounds between which the middle `level` of the values lie."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
