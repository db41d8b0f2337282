"""SLEB against brute force: the least harmful layer in every round, and every set of four among ten."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy import Geometry
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import RegistryError
from buddy.registry import build
from routers.sleb import SLEB
from tests.routers.landscape import Landscape, left_out, rugged
from tests.routers.uneven import WINDOWS, BruteForce, uneven_backbone

SIZES = Geometry(layers=12, context_layer=1, hidden=8, features=4)


def greedy(loss, routable: int, rounds: int) -> list[int]:
    """The layers in the order in which they go, by the plain algorithm."""
    removed = []
    for _ in range(rounds):
        removed.append(min((i for i in range(routable) if i not in removed), key=lambda i: loss([*removed, i])))
    return removed


def searched(asked: list[int], seed: int = 0, **options) -> SLEB:
    backbone = uneven_backbone(seed)
    router = SLEB(geometry_of(backbone), **options)
    router.calibrate(CalibrationProbe(RoutedLM(backbone, router), WINDOWS, 2, asked=asked))
    return router


@pytest.mark.parametrize("seed", [0, 1])
def test_every_removal_is_the_one_that_brute_force_finds_least_harmful(seed):
    router, brute = searched([10, 8], seed), BruteForce(seed)
    order = greedy(brute.ce, 10, 4)
    assert router.rank.argsort()[:4].tolist() == order
    for before, after in pairwise(left_out(router, k) for k in range(12, 7, -1)):
        assert before < after


def test_four_of_ten_are_near_the_best_of_all_sets():
    loss = BruteForce().ce
    every = sorted(loss(removed) for removed in combinations(range(10), 4))
    found = loss(left_out(searched([8]), 8))
    assert every[0] <= found + 1e-6
    assert found < every[0] + 0.02 * (every[-1] - every[0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), least=st.integers(2, 11), budgets=st.integers(1, 3))
def test_it_is_the_plain_algorithm_on_any_losses(seed, least, budgets):
    loss = rugged(10, seed)
    probe = Landscape(SIZES, loss, range(11, least - 1, -1)[-budgets:])
    router = SLEB(SIZES)
    router.calibrate(probe)
    order = greedy(lambda removed: loss(frozenset(removed)), 10, 12 - least)
    assert router.rank.argsort()[: len(order)].tolist() == order
    assert {criterion for _, criterion, _ in probe.calls} == {"ce"}
    assert sorted(router.rank.tolist()) == list(range(10))


def test_layers_that_stay_are_ranked_by_the_last_round():
    probe = Landscape(SIZES, lambda removed: sum((layer * 7) % 10 for layer in removed), [11])
    router = SLEB(SIZES)
    router.calibrate(probe)
    assert router.rank.argsort().tolist() == sorted(range(10), key=lambda layer: (layer * 7) % 10)


def test_where_nothing_is_asked_it_goes_to_the_end():
    router = SLEB(SIZES)
    router.calibrate(Landscape(SIZES, rugged(10, 3), []))
    assert router.rank.argsort().tolist() == greedy(lambda removed: rugged(10, 3)(frozenset(removed)), 10, 10)


def test_of_equal_layers_the_earlier_goes_first():
    router = SLEB(SIZES)
    router.calibrate(Landscape(SIZES, lambda removed: 1.0, [8]))
    assert router.rank.tolist() == list(range(10))


@pytest.mark.parametrize(("windows", "measured"), [(None, 20), (5, 5), (99, 20)])
def test_it_measures_on_the_windows_that_it_is_told(windows, measured):
    probe = Landscape(SIZES, rugged(10, 0), [10], count=20)
    router = SLEB(SIZES, windows=windows)
    router.calibrate(probe)
    assert max(asked for _, _, asked in probe.calls) == measured
    assert len([asked for _, _, asked in probe.calls if asked == measured]) == 2
    assert probe.shown == ["removing layers"]


def test_no_window_is_refused():
    with pytest.raises(RegistryError, match="windows is 0; give 1 or more, or null for all"):
        build("sleb", SIZES, {"windows": 0})


def test_a_second_search_measures_nothing():
    backbone = uneven_backbone()
    router, shown = SLEB(geometry_of(backbone)), []

    def track(items, words):
        shown.append(words)
        return items

    probe = CalibrationProbe(RoutedLM(backbone, router), WINDOWS, track=track, asked=[10])
    router.calibrate(probe)
    first = router.rank.clone()
    probe._measure = None  # any further measurement would fail
    router.calibrate(probe)
    assert torch.equal(router.rank, first)
    assert shown == ["removing layers"] * 2
