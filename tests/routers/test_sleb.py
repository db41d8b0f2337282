"""SLEB against brute force: the least harmful layer in every round, and every set of four among ten."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routers.sleb import SLEB
from tests.routers.landscape import SIZES, Landscape, left_out, rugged, searched
from tests.routers.uneven import BruteForce, calibrated


def greedy(loss, routable: int, rounds: int) -> list[int]:
    """The layers in the order in which they go, by the plain algorithm."""
    removed = []
    for _ in range(rounds):
        removed.append(min((i for i in range(routable) if i not in removed), key=lambda i: loss([*removed, i])))
    return removed


@pytest.mark.parametrize("seed", [0, 1])
def test_every_removal_is_the_one_that_brute_force_finds_least_harmful(seed):
    router, brute = calibrated(SLEB, seed, asked=[10, 8]), BruteForce(seed)
    order = greedy(brute.ce, 10, 4)
    assert router.rank.argsort()[:4].tolist() == order
    for before, after in pairwise(left_out(router, k) for k in range(12, 7, -1)):
        assert before < after


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), least=st.integers(2, 11), budgets=st.integers(1, 3))
def test_it_is_the_plain_algorithm_on_any_losses(seed, least, budgets):
    loss = rugged(10, seed)
    probe = Landscape(SIZES, loss, range(11, least - 1, -1)[-budgets:])
    router = searched(SLEB, probe)
    order = greedy(lambda removed: loss(frozenset(removed)), 10, 12 - least)
    assert router.rank.argsort()[: len(order)].tolist() == order
    assert {criterion for _, criterion, _ in probe.calls} == {"ce"}
    assert sorted(router.rank.tolist()) == list(range(10))


@pytest.mark.parametrize(("windows", "measured"), [(None, 20), (5, 5), (99, 20)])
def test_it_measures_on_the_windows_that_it_is_told(windows, measured):
    probe = Landscape(SIZES, rugged(10, 0), [10], count=20)
    searched(SLEB, probe, windows=windows)
    assert max(asked for _, _, asked in probe.calls) == measured
    assert len([asked for _, _, asked in probe.calls if asked == measured]) == 2
    assert probe.shown == ["removing layers"]
