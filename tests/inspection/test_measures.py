"""Numbers of plans against counting one token at a time."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddy.inspection.routing import SPAN, Measures, commonest_plan


@st.composite
def drawn_plans(draw):
    """(N, T, L), a few windows of a few plans, so that plans repeat, the first layer and the last in all of them."""
    layers, windows, tokens = draw(st.integers(3, 11)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    pool = random.random((draw(st.integers(1, 4)), layers)) < 0.5
    pool[:, [0, -1]] = True
    return pool[random.integers(len(pool), size=(windows, tokens))]


@given(drawn_plans())
def test_measures_are_those_of_counting(runs):
    windows = [[tuple(plan) for plan in window] for window in runs.tolist()]
    plans = [plan for window in windows for plan in window]
    pairs = [pair for window in windows for pair in pairwise(window)]
    counts = Counter(plans)
    reference = np.random.default_rng(0).random(runs.shape[-1]) < 0.5
    found = Measures.of(runs, reference, always_on=2)
    assert (found.tokens, found.plans, found.span) == (len(plans), len(counts), len(windows[0]))
    assert found.share == pytest.approx(np.mean(plans, axis=0))
    assert found.commonest == max(counts.values()) / len(plans)
    apart = [sum(x != y for x, y in zip(a, b, strict=True)) for a, b in pairs]
    assert found.changes == (pytest.approx(np.mean([each > 0 for each in apart])) if pairs else None)
    assert found.apart == (pytest.approx(np.mean(apart)) if pairs else None)
    assert found.distinct == pytest.approx(np.mean([len(set(window)) for window in windows]))
    chosen = sum(map(sum, plans)) - 2 * len(plans)
    off = sum(ran and not kept for plan in plans for ran, kept in zip(plan, reference, strict=True))
    assert found.off_commonest == pytest.approx(off / chosen if chosen else 0)
    ties = [plan for plan, count in counts.items() if count == max(counts.values())]
    assert tuple(commonest_plan(runs)) == min(ties)


def test_distinct_plans_are_counted_in_stretches_that_cover_the_window():
    plans = np.eye(300, dtype=bool)[:, :299]  # every token another plan, but for the last, which is empty
    runs = np.stack([plans, np.zeros_like(plans)])
    found = Measures.of(runs, runs[0, 0], always_on=0)
    assert (found.span, found.plans) == (SPAN, 300)
    assert found.distinct == (128 + 1) / 2
    changing = np.zeros((1, 255, 4), dtype=bool)
    changing[0, :127, 1] = True  # stretches 0 … 127 and 127 … 254: two plans, then one
    assert Measures.of(changing, changing[0, 0], always_on=0).distinct == 1.5
