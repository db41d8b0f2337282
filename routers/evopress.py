"""EvoPress: an evolutionary search for the set of layers closest to the dense model (Sieberling et al., 2410.14649)."""

import random
from collections.abc import Callable, Iterable, Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor

from buddy import Context, Geometry, Probe, Router
from routers.gates import check_least

Removed = tuple[int, ...]  # routable layers that are left out, in rising order
Fitness = Callable[[Sequence[Removed], int], list[float]]  # KL of each set on so many windows; less is better
Track = Callable[[Sequence[Any], str], Iterable[Any]]
TRIES = 20  # draws for each set wanted; where too few different sets exist, fewer are made


class EvoPress(Router):
    """Static: for each K, the set of layers whose predictions are closest (KL) to the dense model's.

    Algorithm 1, a (1 + λ) evolutionary search under a fixed count. It starts from the best of `initial` random sets.
    Each generation makes `offspring` different sets from the one parent by level-switch mutation: min(u, v) swaps of a
    kept and a removed layer, u and v uniform from 1 to `swaps`. Selection goes in stages (section 3, "multi-step
    selection"): the i-th measures KL(dense ‖ set) on `windows[i]` calibration windows and keeps `survivors[i]` sets;
    the parent competes in the last stage (elitism), so the loss there never rises.

    Each K of the recipe's budgets has a search of its own, with random numbers from the seed and K. Any other K starts
    from the nearest searched set (of two, the deeper): layers are added or removed by the number of searched sets that
    keep them, then by Block Influence, which alone decides where nothing was searched.

    Deviations from the paper: whole layers, where it drops attention and MLP separately (its code has whole blocks as
    an option); the context layers and the last always run and the sinks run every layer, as for every router here; a
    stage measures on the first windows, the same in each generation, where the paper draws new ones, so that no loss is
    measured twice; smaller defaults that fit a CPU. With windows of 256 tokens the paper's are
    `generations: null, windows: [8, 128], patience: null`.

    Args:
        geometry: sizes of the backbone.
        generations: at most; null for the paper's n · (L − n) / 1.5 with n of L layers removed.
        offspring: λ, sets made in a generation.
        initial: random sets at the start, measured on `windows[0]`.
        survivors: sets that each stage keeps, falling to 1.
        windows: calibration windows that each stage measures on; where there are fewer, all.
        swaps: most swaps that make an offspring.
        patience: generations without a better parent after which the search ends; null for never.
        seed: of the search; null for the recipe's.

    Raises:
        ValueError: a number out of range, or stages that do not fit together.
    """

    source = "arXiv 2410.14649"
    seeded = True

    def __init__(
        self,
        geometry: Geometry,
        *,
        generations: int | None = 25,
        offspring: int = 32,
        initial: int = 64,
        survivors: Sequence[int] = (2, 1),
        windows: Sequence[int] = (1, 8),
        swaps: int = 3,
        patience: int | None = 8,
        seed: int | None = None,
    ) -> None:
        super().__init__(geometry)
        check_least(1, generations=generations, offspring=offspring, initial=initial, swaps=swaps, patience=patience)
        self.survivors, self.windows = _stages(survivors, windows)
        self.generations, self.offspring, self.initial = generations, offspring, initial
        self.swaps, self.patience, self.seed = swaps, patience, seed
        self.register_buffer("worth", torch.zeros(geometry.routable + 1, geometry.routable))

    def calibrate(self, probe: Probe) -> None:
        """Search on the calibration windows for each K that the recipe's budgets stand for."""

        def fitness(sets: Sequence[Removed], windows: int) -> list[float]:
            plans = torch.stack([probe.plan_without(removed) for removed in sets])
            return probe.losses(plans, "kl", min(windows, probe.count)).mean(1).tolist()

        seed, found = probe.seed if self.seed is None else self.seed, {}
        for executed in probe.layer_counts:
            draw, count = random.Random(f"{seed} {executed}"), self.geometry.layers - executed
            found[executed - self.geometry.always_on] = self._search(fitness, count, draw, probe.track)
        self._rank(found, probe.block_influence)

    def score(self, context: Context) -> Tensor:
        """(..., R): larger for the layers of the set found for this K."""
        return self.worth[context.executed - self.geometry.always_on]

    def _rank(self, found: dict[int, Removed], influence: Tensor) -> None:
        """Fill `worth`: for each number of routable layers the nearest found set, then votes, then Block Influence."""
        routable = self.geometry.routable
        kept = {k: torch.ones(routable).index_fill_(0, torch.tensor(out), 0.0) for k, out in found.items()}
        votes = sum(kept.values(), torch.zeros(routable))
        tie = votes * routable + influence.argsort(stable=True).argsort()
        for k in range(routable + 1):
            nearest = min(kept, key=lambda other: (abs(other - k), -other), default=None)
            first = 0.0 if nearest is None else kept[nearest] * (len(kept) + 1) * routable
            self.worth[k] = first + tie

    def _search(self, fitness: Fitness, count: int, draw: random.Random, track: Track) -> Removed:
        """The best set of `count` removed layers that is found."""
        parent = self._start(fitness, count, draw)
        if comb(self.geometry.routable, count) == 1:
            return parent
        best, stale, left = fitness([parent], self.windows[-1])[0], 0, self.geometry.layers - count
        generations = self.generations or max(1, int(count * left / 1.5))
        for _ in track(range(generations), f"searching for {left} layers"):
            parent, loss = self._select(fitness, self._mutants(draw, parent), parent)
            stale = 0 if loss < best else stale + 1
            best = min(best, loss)
            if stale == self.patience:
                break
        return parent

    def _start(self, fitness: Fitness, count: int, draw: random.Random) -> Removed:
        """The best of random sets on the windows of the first stage."""
        sets = _different(lambda: tuple(sorted(draw.sample(range(self.geometry.routable), count))), self.initial)
        return _best(sets, fitness(sets, self.windows[0]), 1)[0][1] if len(sets) > 1 else sets[0]

    def _mutants(self, draw: random.Random, parent: Removed) -> list[Removed]:
        """Different sets, none the parent, each a few swaps of a kept and a removed layer away from it."""

        def make() -> Removed:
            removed = set(parent)
            for _ in range(min(draw.randint(1, self.swaps), draw.randint(1, self.swaps))):
                kept = [layer for layer in range(self.geometry.routable) if layer not in removed]
                leaves, returns = draw.choice(kept), draw.choice(sorted(removed))
                removed = removed - {returns} | {leaves}
            return tuple(sorted(removed))

        return _different(make, self.offspring, parent)

    def _select(self, fitness: Fitness, sets: list[Removed], parent: Removed) -> tuple[Removed, float]:
        """The best of the sets and their parent by the stages, and its loss in the last one."""
        ranked: list[tuple[float, Removed]] = []
        for stage, (survivors, windows) in enumerate(zip(self.survivors, self.windows, strict=True), start=1):
            if stage == len(self.windows):
                sets = [parent, *sets]
            ranked = _best(sets, fitness(sets, windows), survivors)
            sets = [each for _, each in ranked]
        return ranked[0][1], ranked[0][0]


def _different(make: Callable[[], Removed], wanted: int, but: Removed | None = None) -> list[Removed]:
    """Up to so many different sets, in the order in which they were made."""
    found: dict[Removed, None] = {}
    for _ in range(TRIES * wanted):
        if len(found) < wanted and (made := make()) != but:
            found[made] = None
    return list(found)


def _best(sets: Sequence[Removed], losses: Sequence[float], number: int) -> list[tuple[float, Removed]]:
    order = sorted(range(len(sets)), key=losses.__getitem__)  # stable: of equal ones the earlier
    return [(losses[i], sets[i]) for i in order[:number]]


def _stages(survivors: Any, windows: Any) -> tuple[list[int], list[int]]:
    for name, value in (("survivors", survivors), ("windows", windows)):
        if not isinstance(value, Sequence) or any(type(each) is not int for each in value):
            raise ValueError(f"{name} is {value!r}; give a list of whole numbers")
    survivors, windows = list(survivors), list(windows)
    if not survivors or len(survivors) != len(windows):
        raise ValueError(f"survivors is {survivors} and windows {windows}; give both a number for each stage")
    if survivors[-1] != 1 or survivors != sorted(survivors, reverse=True):
        raise ValueError(f"survivors is {survivors}; give numbers that fall to 1 in the last stage")
    if windows[0] < 1 or windows != sorted(windows):
        raise ValueError(f"windows is {windows}; give numbers from 1 that do not fall")
    return survivors, windows
