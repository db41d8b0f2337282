"""Numbers of plans against counting one token at a time."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddy.inspection.routing import SPAN, Measures, Routing, changed_layers, commonest_plan, pooled_share


@st.composite
def routings(draw):
    """A few windows of a few plans, so that plans repeat, the first layer and the last in all of them."""
    layers, sinks = draw(st.integers(3, 11)), draw(st.integers(0, 2))
    windows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    pool = random.random((draw(st.integers(1, 4)), layers)) < 0.5
    pool[:, [0, -1]] = True
    runs = pool[random.integers(len(pool), size=(windows, sinks + tokens))]
    runs[:, :sinks] = True
    return Routing(runs, sinks)


def as_tuples(routing: Routing) -> list[list[tuple[bool, ...]]]:
    return [[tuple(plan) for plan in window[routing.sinks :]] for window in routing.runs.tolist()]


@given(routings())
def test_measures_are_those_of_counting(routing):
    windows, layers = as_tuples(routing), routing.runs.shape[-1]
    plans = [plan for window in windows for plan in window]
    pairs = [pair for window in windows for pair in pairwise(window)]
    reference = np.random.default_rng(0).random(layers) < 0.5
    found = Measures.of(routing, reference, always_on=2)
    assert found.tokens == len(plans)
    assert found.executed == (
        min(map(sum, plans)),
        pytest.approx(np.mean([sum(p) for p in plans])),
        max(map(sum, plans)),
    )
    assert found.share == pytest.approx([sum(plan[i] for plan in plans) / len(plans) for i in range(layers)])
    assert found.plans == len(set(plans))
    assert found.commonest == max(Counter(plans).values()) / len(plans)
    if pairs:
        assert found.changes == pytest.approx(sum(a != b for a, b in pairs) / len(pairs))
        assert found.apart == pytest.approx(
            sum(x != y for a, b in pairs for x, y in zip(a, b, strict=True)) / len(pairs)
        )
    else:
        assert (found.changes, found.apart) == (None, None)
    assert found.span == len(windows[0])
    assert found.distinct == pytest.approx(np.mean([len(set(window)) for window in windows]))
    chosen = sum(map(sum, plans)) - 2 * len(plans)
    off = sum(ran and not kept for plan in plans for ran, kept in zip(plan, reference, strict=True))
    assert found.off_commonest == pytest.approx(off / chosen if chosen else 0)


@given(st.lists(routings(), min_size=1, max_size=3))
def test_the_commonest_plan_and_the_share_are_over_all_texts(several):
    layers = several[0].runs.shape[-1]
    several = [each for each in several if each.runs.shape[-1] == layers]
    plans = [plan for each in several for window in as_tuples(each) for plan in window]
    counts = Counter(plans)
    ties = [plan for plan, count in counts.items() if count == max(counts.values())]
    assert tuple(commonest_plan(several)) == min(ties)
    assert pooled_share(several) == pytest.approx(np.mean(plans, axis=0))


def test_distinct_plans_are_counted_in_stretches_that_cover_the_window():
    plans = np.eye(300, dtype=bool)[:, :299].repeat(1, 0)  # every token another plan, but for the last, which is empty
    runs = np.stack([plans, np.zeros_like(plans)])
    found = Measures.of(Routing(runs, 0), runs[0, 0], always_on=0)
    assert (found.span, found.plans) == (SPAN, 300)
    assert found.distinct == (128 + 1) / 2
    changing = np.zeros((1, 255, 4), dtype=bool)
    changing[0, :127, 1] = True  # stretches 0 … 127 and 127 … 254: two plans, then one
    assert Measures.of(Routing(changing, 0), changing[0, 0], always_on=0).distinct == 1.5


def test_changed_layers_say_nothing_of_sinks():
    runs = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]], dtype=bool)
    assert changed_layers(runs, sinks=2).tolist() == [0, 0, 0, 0, 2]
    assert changed_layers(runs, sinks=0).tolist() == [0, 0, 1, 0, 2]
    assert changed_layers(runs[:1], sinks=0).tolist() == [0]
