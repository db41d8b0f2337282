"""PuDDing: choose one of a few sets of layers from the prompt (Wee et al., 2502.04348)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy import Context, Geometry, Router

if TYPE_CHECKING:
    from buddy import Probe

STRENGTHS = 10.0 ** torch.arange(-3, 4, dtype=torch.float64)  # of the ridge, in units of the features' variance
ROUNDS = 20  # of k-means, which settles long before


class PuDDing(Router):
    """Learned: a pool of sets, and a regression of each set's loss from the prompt; the least loss chooses the set.

    A pool of sets for each K is found by greedy removal of layers, one search for each domain. Their losses on
    calibration prompts are regressed from the prompt, by least squares. The set of least predicted loss serves the
    prompt and all that is generated after it. Nothing is left to train after calibration.

    Deviations from the paper and its authors' code:

    - Domains are groups of alike calibration windows, where the paper has five tasks and searches each under two
      losses: ten sets.
    - The searched and regressed loss is the cross-entropy of a whole window, where the paper has the log-likelihood of
      an answer to its prompt.
    - The regression is linear, from the mean state of the prompt after the context layer, where the paper fine-tunes a
      BERT on the prompt's text: calibration windows are few. Its ridge is the one with the least leave-one-out error,
      or endless, so that where prompts tell nothing the set that is best on average serves all. What a window's losses
      have in common is left out; it does not change which is least.
    - Sinks run every layer. The first and the last layer always run, in the authors' code too.

    A search removes layer after layer, so it answers every K. Where no budget asked for a K, the regression of the
    nearest K that was asked for (of two, the deeper) chooses.

    Args:
        geometry: sizes of the backbone.
        pool: sets for each K.
        windows: calibration windows of each search, those nearest to the middle of their group; null for all. The
            paper's searches have 128 samples each.

    Raises:
        ValueError: no set, or no window.
    """

    kind = "learned"
    source = "arXiv 2502.04348"
    scope = "prompt"

    def __init__(self, geometry: Geometry, *, pool: int = 4, windows: int | None = 8) -> None:
        super().__init__(geometry)
        if pool < 1:
            raise ValueError(f"pool is {pool}; give 1 set or more")
        if windows is not None and windows < 1:
            raise ValueError(f"windows is {windows}; give 1 or more, or null for all")
        self.pool, self.windows = pool, windows
        routable, features = geometry.routable, geometry.features
        self.register_buffer("rank", torch.zeros(pool, routable))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("slope", torch.zeros(routable + 1, pool, features))
        self.register_buffer("level", torch.zeros(routable + 1, pool))

    def calibrate(self, probe: Probe) -> None:
        """Group the windows, search a set a group, and regress the losses of all sets on all windows."""
        seen = _unit(probe.contexts().pooled.cpu())
        self.mean.copy_(seen.mean(0))
        self.scale.copy_(seen.std(0, correction=0).clamp(min=1e-6))
        features = ((seen - self.mean.cpu()) / self.scale.cpu()).double()
        searches = [_Search(probe, group[: self.windows]) for group in alike(features, self.pool, probe.seed)]
        rounds = self.geometry.layers - min(probe.asked, default=self.geometry.always_on)
        for search in probe.track([each for each in searches for _ in range(rounds)], "searching the pool"):
            search.remove_one()
        for index in range(self.pool):  # where there are fewer windows than sets, some sets come twice
            self.rank[index] = searches[index % len(searches)].rank()
        for k, (slope, level) in self._regressions(probe, features).items():
            self.slope[k], self.level[k] = slope, level

    def predicted(self, context: Context) -> Tensor:
        """(..., pool) float32: the loss of each set for this prompt and K, but for what all sets have in common."""
        features = (_unit(context.pooled) - self.mean) / self.scale
        losses = (features @ self.slope.flatten(0, 1).T).unflatten(-1, self.level.shape) + self.level
        k = (context.executed - self.geometry.always_on)[..., None, None].expand(*context.executed.shape, 1, self.pool)
        return losses.gather(-2, k)[..., 0, :]

    def score(self, context: Context) -> Tensor:
        """(..., R): when the chosen search removed each layer."""
        return self.rank[self.predicted(context).argmin(-1)]

    def _regressions(self, probe: Probe, features: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """For each number k of routable layers, slope (pool, F) and level (pool,), by that asked for or the nearest."""
        fitted = {}
        for executed in probe.track(probe.asked, "losses of the pool"):
            k = executed - self.geometry.always_on
            removed = [row.argsort()[: self.geometry.routable - k].tolist() for row in self.rank]
            losses = probe.losses(torch.stack([probe.plan_without(layers) for layers in removed])).T
            fitted[k] = ridge(features, losses - losses.mean(1, keepdim=True))
        if not fitted:
            return {}
        nearest = {
            k: min(fitted, key=lambda a, k=k: (abs(a - k), -a))  # type: ignore[misc]
            for k in range(self.geometry.routable + 1)
        }
        return {k: fitted[a] for k, a in nearest.items()}


class _Search:
    """Greedy removal on a few windows, as in SLEB: always the layer whose loss now costs least.

    Args:
        probe: measures the losses.
        windows: numbers of the windows.
    """

    def __init__(self, probe: Probe, windows: Sequence[int]) -> None:
        self.probe, self.windows = probe, sorted(windows)
        self.removed: list[int] = []
        self.left = list(range(probe.geometry.routable))
        self.losses = [0.0] * len(self.left)  # without the layer, at the last look

    def remove_one(self) -> None:
        """Another round."""
        plans = torch.stack([self.probe.plan_without([*self.removed, layer]) for layer in self.left])
        self.losses = self.probe.losses(plans, windows=self.windows).mean(1).tolist()
        least = self.losses.index(min(self.losses))
        self.losses.pop(least)
        self.removed.append(self.left.pop(least))

    def rank(self) -> Tensor:
        """(R,) when each layer goes; those that are left by what the last round said of them."""
        order = self.removed + [layer for _, layer in sorted(zip(self.losses, self.left, strict=True))]
        return torch.tensor(order).argsort().float()


def ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Slope (P, F) and level (P,) of a linear regression whose ridge has the least leave-one-out error.

    Args:
        features: (N, F) float64, of mean 0.
        targets: (N, P) float64.
    """
    level, count = targets.mean(0), len(features)
    values, vectors = torch.linalg.eigh(features @ features.T)
    values, parts = values.clamp(min=0), vectors.T @ (targets - level)
    slope = torch.zeros(features.shape[1], len(level))  # an endless ridge: the mean for all
    best = _left_out(targets - level, torch.full((count,), 1 / count))
    for strength in STRENGTHS * features.square().sum() / count:
        shrunk = values / (values + strength)
        rest = targets - level - vectors @ (shrunk[:, None] * parts)
        error = _left_out(rest, 1 / count + (vectors.square() * shrunk).sum(1))
        if error < best:
            best, slope = error, features.T @ (vectors @ (parts / (values + strength)[:, None]))
    return slope.T, level


def _left_out(rest: Tensor, leverage: Tensor) -> float:
    """Mean square of what would be left of each row (N, P), had the regression not seen it."""
    return (rest / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean().item()


def alike(features: Tensor, count: int, seed: int) -> list[list[int]]:
    """Rows (N, F) in at most `count` groups of alike ones and of like size, the nearest to its middle first in each.

    K-means of bounded size, from middles drawn one after the other with odds of their squared distance to the nearest.
    """
    generator, rows = torch.Generator().manual_seed(seed), len(features)
    count = min(count, rows)
    middles = features[torch.randint(rows, (1,), generator=generator)]
    while len(middles) < count:
        odds = torch.cdist(features, middles).amin(1).square() + 1e-12
        middles = torch.cat([middles, features[torch.multinomial(odds, 1, generator=generator)]])
    groups: list[list[int]] = []
    for _ in range(ROUNDS):
        before, groups = groups, _bounded(torch.cdist(features, middles))
        if groups == before:
            break
        middles = torch.stack([features[group].mean(0) for group in groups])
    return groups


def _bounded(distances: Tensor) -> list[list[int]]:
    """Rows to middles, the nearest pairs first; a group takes its even share of the rows, the first ones one more."""
    rows, count = distances.shape
    room = [rows // count + (index < rows % count) for index in range(count)]
    groups: list[list[int]] = [[] for _ in range(count)]
    taken: set[int] = set()
    for pair in distances.flatten().argsort(stable=True).tolist():
        row, index = divmod(pair, count)
        if row not in taken and len(groups[index]) < room[index]:
            groups[index].append(row)
            taken.add(row)
    return groups


def _unit(pooled: Tensor) -> Tensor:
    return F.layer_norm(pooled, pooled.shape[-1:])
