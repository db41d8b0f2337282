"""Routers without a model: contexts, and a probe whose losses are a known function of the layers that are left out."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from buddy import Context, Geometry, Plan, Router

Removed = frozenset[int]
SIZES = Geometry(
    layers=12, context_layer=1, hidden=8, features=4
)  # ten routable layers, so that 210 sets leave out four


class Landscape:
    """Stands in for `Probe` where only `losses` matter, and notes what was asked.

    Args:
        geometry: sizes of the backbone that is not there.
        loss: the loss of a set of routable layers left out, the mean over all windows.
        layer_counts: K's of the budgets, deepest first.
        seed: the recipe's.
        count: calibration windows, of which each has the same loss.
    """

    def __init__(
        self,
        geometry: Geometry,
        loss: Callable[[Removed], float] = lambda removed: 0.0,
        layer_counts: Sequence[int] = (),
        *,
        seed: int = 0,
        count: int = 8,
    ) -> None:
        self.geometry, self.loss, self.layer_counts, self.seed, self.count = (
            geometry,
            loss,
            tuple(layer_counts),
            seed,
            count,
        )
        self.bridge_windows = 0
        self.block_influence = torch.linspace(1, 2, geometry.routable)
        self.calls: list[tuple[list[Removed], str, int]] = []  # sets, criterion, windows
        self.shown: list[str] = []
        self.bridged: set[bool] = set()  # whether losses were asked with bridges

    def losses(
        self, runs: Tensor, criterion: str = "ce", windows: int | None = None, *, bridged: bool = False
    ) -> Tensor:
        """(P, W): each window alike; bridges change no loss."""
        first, routable = self.geometry.context_layer, self.geometry.routable
        assert runs.shape[1] == self.geometry.layers
        assert runs[:, :first].all()
        assert runs[:, -1].all()
        windows = self.count if windows is None else windows
        assert 1 <= windows <= self.count
        sets = [frozenset((~row).nonzero()[:, 0].tolist()) for row in runs[:, first : first + routable]]
        self.calls.append((sets, criterion, windows))
        self.bridged.add(bridged)
        return torch.tensor([[self.loss(each)] * windows for each in sets], dtype=torch.float64)

    def plan_without(self, removed: Iterable[int]) -> Tensor:
        """(L,) bool."""
        runs = torch.ones(self.geometry.layers, dtype=torch.bool)
        for layer in removed:
            runs[self.geometry.context_layer + layer] = False
        return runs

    def track(self, items: Sequence[Any], words: str) -> Iterable[Any]:
        """Shows nothing."""
        self.shown.append(words)
        return items

    def exhaustive(self, removed: int) -> list[tuple[float, Removed]]:
        """Every set of so many layers, best first."""
        sets = map(frozenset, combinations(range(self.geometry.routable), removed))
        return sorted(((self.loss(each), each) for each in sets), key=lambda pair: pair[0])


def rugged(routable: int, seed: int, interaction: float = 1.0) -> Callable[[Removed], float]:
    """A loss with a cost for each layer and one for each pair, so that a layer's worth hangs on the others."""
    generator = torch.Generator().manual_seed(seed)
    alone = torch.rand(routable, generator=generator, dtype=torch.float64)
    pair = interaction * torch.randn(routable, routable, generator=generator, dtype=torch.float64).triu(1)
    return with_pairs(alone, pair)


def with_pairs(alone: Tensor, pair: Tensor) -> Callable[[Removed], float]:
    """A loss with a cost (R,) for each layer that is left out, and one (R, R) for each pair of them."""
    costs, joint = alone.tolist(), pair.tolist()
    return lambda removed: sum(costs[one] + sum(joint[one][other] for other in removed) for one in removed)


def searched(cls: type[Router], probe: Landscape, **options: Any) -> Any:
    """A router that was calibrated by this probe."""
    router = cls(probe.geometry, **options)
    router.calibrate(probe)
    return router


def context(geometry: Geometry, *leading: int, executed: int = 4, seed: int = 0) -> Context:
    """A random context."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (geometry.features, geometry.features, geometry.hidden)
    pooled, newest, hidden = (torch.randn(*leading, size, generator=generator) for size in sizes)
    return Context(pooled, newest, hidden, torch.full(leading, executed))


def left_out(router: Router, executed: int) -> Removed:
    """The routable layers that a router's plan for K leaves out, one plan for whatever context."""
    sizes = router.geometry
    scores = router.score(context(sizes, executed=executed))
    runs = Plan.from_scores(scores, torch.tensor(executed), sizes.layers).runs
    assert int(runs.sum()) == executed
    return frozenset((~runs[sizes.context_layer : -1]).nonzero()[:, 0].tolist())
