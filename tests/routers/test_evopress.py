"""The evolutionary search against every set of four layers among ten, and what it owes on any losses."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from routers.evopress import EvoPress
from routers.sleb import SLEB
from tests.routers.landscape import SIZES, Landscape, left_out, rugged, searched


def test_it_passes_the_greedy_search_where_layers_hang_together():
    """Its paper's point: what one layer is worth depends on which others are there."""
    gaps: dict[str, list[float]] = {"evopress": [], "sleb": []}
    for seed in range(20):
        probe = Landscape(SIZES, rugged(10, seed, interaction=0.5), [8])
        every = probe.exhaustive(4)
        best, median = every[0][0], every[len(every) // 2][0]
        for name, cls in (("evopress", EvoPress), ("sleb", SLEB)):
            gaps[name].append((probe.loss(left_out(searched(cls, probe), 8)) - best) / (median - best))
    optimal = {name: sum(gap < 1e-9 for gap in found) for name, found in gaps.items()}
    assert optimal["evopress"] >= 16 > optimal["sleb"]
    assert sum(gaps["evopress"]) < 0.25 * sum(gaps["sleb"])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), asked=st.sets(st.integers(2, 11), min_size=1, max_size=3))
def test_the_loss_never_rises_from_the_start(seed, asked):
    probe = Landscape(SIZES, rugged(10, seed), sorted(asked, reverse=True), seed=seed)
    router = searched(EvoPress, probe, generations=3, offspring=4, initial=5)
    for executed in probe.layer_counts:
        starts = [sets for sets, _, windows in probe.calls if windows == 1 and len(sets[0]) == 12 - executed]
        found = left_out(router, executed)
        assert len(found) == 12 - executed
        if starts:  # else there is one set only
            assert probe.loss(found) <= min(map(probe.loss, starts[0]))


@given(seed=st.integers(0, 999), count=st.integers(1, 9), offspring=st.integers(1, 40), swaps=st.integers(1, 4))
def test_offspring_differ_by_swaps(seed, count, offspring, swaps):
    search = EvoPress(SIZES, offspring=offspring, swaps=swaps)
    draw = random.Random(seed)
    parent = search._start(lambda sets, _: [0.0] * len(sets), count, draw)
    sets = search._mutants(draw, parent)
    assert len(sets) == len(set(sets)) <= offspring
    assert len(sets) >= min(offspring, 3, count * (10 - count))
    for each in sets:
        assert list(each) == sorted(set(each))
        assert len(each) == count
        assert 1 <= len({*each} - {*parent}) <= swaps


def test_selection_narrows_in_stages():
    probe = Landscape(SIZES, rugged(10, 0), [8], count=20)
    searched(
        EvoPress, probe, generations=2, patience=None, offspring=12, initial=6, survivors=[5, 2, 1], windows=[1, 4, 16]
    )
    sizes = [(len(sets), criterion, windows) for sets, criterion, windows in probe.calls]
    generation = [(12, "kl", 1), (5, "kl", 4), (3, "kl", 16)]
    assert sizes == [(6, "kl", 1), (1, "kl", 16), *generation, *generation]
    (parent,) = probe.calls[1][0]
    assert probe.calls[4][0][0] == parent, "the parent stands the last stage, and stays if none is better"
    for (many, _, _), (few, _, _) in zip(probe.calls[2:4], probe.calls[3:5], strict=True):
        best = sorted(map(probe.loss, many))
        assert [probe.loss(each) for each in few if each != parent] == best[: len([e for e in few if e != parent])]


def test_other_numbers_of_layers_build_on_the_nearest_set():
    probe = Landscape(SIZES, rugged(10, 11), [9, 5])
    router = searched(EvoPress, probe)
    sets = {k: left_out(router, k) for k in range(2, 13)}
    for k in (12, 11, 10, 9):
        assert sets[k] <= sets[9]
    for k in (8, 7):  # 7 is as near to 5; of two the deeper
        assert sets[9] <= sets[k]
    assert sets[5] <= sets[4] <= sets[3] <= sets[2]
    assert sets[6] <= sets[5]
    once, both = sets[9] - sets[5], sets[9] & sets[5]  # layers that one set leaves out come back before those of both
    assert once - sets[6]
    assert both <= sets[6]


def test_where_nothing_is_asked_block_influence_decides():
    probe = Landscape(SIZES, rugged(10, 0), [])
    router = searched(EvoPress, probe)
    assert probe.calls == []
    for k in range(2, 13):
        assert left_out(router, k) == frozenset(range(12 - k))
