"""PuDDing: choose one of a few sets of layers from the prompt (Wee et al., 2502.04348)."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Probe, Router
from routers.gates import check_least, normalised
from routers.greedy import GreedyRemoval

STRENGTHS = 10.0 ** torch.arange(-3, 4, dtype=torch.float64)  # of the ridge, in units of the features' variance
ROUNDS = 20  # of k-means, which converges long before


class PuDDing(Router):
    """Learned: for each prompt, the set of layers from a small pool whose predicted loss is least.

    A pool of sets for each K is found by greedy removal of layers, one search for each domain. Their losses on
    calibration prompts are regressed from the prompt, by least squares. The set of least predicted loss serves the
    prompt and all that is generated after it. Calibration does all this; nothing is trained afterwards.

    Deviations from the paper and its authors' code:

    - Domains are clusters of calibration windows, where the paper has five tasks and searches each under two losses:
      ten sets.
    - The searched and regressed loss is the cross-entropy of a whole window, where the paper has the log-likelihood of
      an answer to its prompt.
    - The regression is linear, from the mean of the values that the context layer cached for the prompt, where the
      paper fine-tunes a BERT on the prompt's text: calibration windows are few. Its ridge has the least leave-one-out
      error, or is infinite: where prompts predict nothing, the set that is best on average serves all. The mean of a
      window's losses is subtracted first; it does not change which is least.
    - Sinks run every layer. The context layers and the last always run; in the authors' code the first and last.

    A search answers every K. For a K that is not among the recipe's budgets, the regression of the nearest K that is
    (of two, the deeper) chooses.

    Args:
        geometry: sizes of the backbone.
        pool: sets for each K.
        windows: calibration windows of each search, those nearest to the centre of their cluster; null for all. The
            paper's searches have 128 samples each.

    Raises:
        ValueError: no set, or no window.
    """

    kind = "learned"
    source = "arXiv 2502.04348"
    scope = "prompt"

    def __init__(self, geometry: Geometry, *, pool: int = 4, windows: int | None = 8) -> None:
        super().__init__(geometry)
        check_least(1, pool=pool, windows=windows)
        self.pool, self.windows = pool, windows
        routable, features = geometry.routable, geometry.features
        self.register_buffer("rank", torch.zeros(pool, routable))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("slope", torch.zeros(routable + 1, pool, features))
        self.register_buffer("level", torch.zeros(routable + 1, pool))

    def calibrate(self, probe: Probe) -> None:
        """Cluster the windows, search one set for each cluster, and regress the losses of all sets on all windows."""
        pooled = normalised(probe.contexts().pooled.cpu())
        self.mean.copy_(pooled.mean(0))
        self.scale.copy_(pooled.std(0, correction=0).clamp(min=1e-6))
        features = ((pooled - self.mean.cpu()) / self.scale.cpu()).double()
        groups = clusters(features, self.pool, probe.seed)
        searches = [GreedyRemoval(probe, sorted(group[: self.windows])) for group in groups]
        rounds = [search for search in searches for _ in range(search.rounds)]
        for search in probe.track(rounds, "searching the pool"):
            search.remove_one()
        for index in range(self.pool):  # where there are fewer windows than sets, some sets come twice
            self.rank[index] = searches[index % len(searches)].rank()
        for k, (slope, level) in self._regressions(probe, features).items():
            self.slope[k], self.level[k] = slope, level

    def predicted(self, context: Context) -> Tensor:
        """(..., pool) float32: the predicted loss of each set for this prompt and K, less the mean over the pool."""
        features = (normalised(context.pooled) - self.mean) / self.scale
        losses = (features @ self.slope.flatten(0, 1).T).unflatten(-1, self.level.shape) + self.level
        k = (context.executed - self.geometry.always_on)[..., None, None].expand(*context.executed.shape, 1, self.pool)
        return losses.gather(-2, k)[..., 0, :]

    def score(self, context: Context) -> Tensor:
        """(..., R): the round in which the chosen search removed each layer."""
        return self.rank[self.predicted(context).argmin(-1)]

    def _regressions(self, probe: Probe, features: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """For each number k of routable layers: slope (pool, F) and level (pool,) of the nearest measured k."""
        fitted = {}
        for executed in probe.track(probe.layer_counts, "losses of the pool"):
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


def ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Slope (P, F) and level (P,) of a linear regression whose ridge has the least leave-one-out error.

    Args:
        features: (N, F) float64, of mean 0.
        targets: (N, P) float64.
    """
    level, count = targets.mean(0), len(features)
    values, vectors = torch.linalg.eigh(features @ features.T)
    values, parts = values.clamp(min=0), vectors.T @ (targets - level)
    slope = torch.zeros(features.shape[1], len(level))  # an infinite ridge: the mean for all
    best = _left_out(targets - level, torch.full((count,), 1 / count))
    for strength in STRENGTHS * features.square().sum() / count:
        shrunk = values / (values + strength)
        rest = targets - level - vectors @ (shrunk[:, None] * parts)
        error = _left_out(rest, 1 / count + (vectors.square() * shrunk).sum(1))
        if error < best:
            best, slope = error, features.T @ (vectors @ (parts / (values + strength)[:, None]))
    return slope.T, level


def _left_out(rest: Tensor, leverage: Tensor) -> float:
    """Mean squared leave-one-out error, from residuals (N, P) and the leverage (N,) of each row."""
    return (rest / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean().item()


def clusters(features: Tensor, count: int, seed: int) -> list[list[int]]:
    """Rows (N, F) in at most `count` clusters of equal size (±1); in each the row nearest to the centre comes first.

    K-means with bounded clusters and the start of k-means++: each centre is drawn with probability proportional to the
    squared distance to the nearest centre so far.
    """
    generator, rows = torch.Generator().manual_seed(seed), len(features)
    count = min(count, rows)
    centres = features[torch.randint(rows, (1,), generator=generator)]
    while len(centres) < count:
        odds = torch.cdist(features, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, features[torch.multinomial(odds, 1, generator=generator)]])
    groups: list[list[int]] = []
    for _ in range(ROUNDS):
        before, groups = groups, _bounded(torch.cdist(features, centres))
        if groups == before:
            break
        centres = torch.stack([features[group].mean(0) for group in groups])
    return groups


def _bounded(distances: Tensor) -> list[list[int]]:
    """Assign rows to centres, the nearest pairs first; each cluster takes an equal share, the first ones one more."""
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
