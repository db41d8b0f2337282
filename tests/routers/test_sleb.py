"""SLEB against the plain algorithm: in every round the least harmful layer goes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routers.sleb import SLEB
from tests.routers.landscape import SIZES, Landscape, rugged, searched


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), least=st.integers(2, 11), budgets=st.integers(1, 3))
def test_it_is_the_plain_algorithm_on_any_losses(seed, least, budgets):
    loss = rugged(10, seed)
    probe = Landscape(SIZES, loss, range(11, least - 1, -1)[-budgets:])
    router = searched(SLEB, probe)
    order: list[int] = []
    for _ in range(12 - least):
        order.append(min({*range(10)} - {*order}, key=lambda layer: loss(frozenset([*order, layer]))))
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
