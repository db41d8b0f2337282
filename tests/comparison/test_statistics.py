"""The bootstrap over documents and seeds against the plain one, against loops, and against what must hold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy.scoring.perplexity import Scores, paired_difference
from buddy.scoring.statistics import accuracy_difference, difference, loss_interval, mean_loss, resamples


def made(losses: np.ndarray, tokens: np.ndarray) -> Scores:
    return Scores(0.5, 3, (3, 3.0, 3), 1, losses, losses / 10, tokens)


def routers(seeds: int, others: int, documents: int = 7, seed: int = 0) -> tuple[list[Scores], list[Scores]]:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(20, 60, documents).astype(float)
    common = 3 + draw.standard_normal(documents)
    groups = [[tokens * (common + 0.3 * draw.standard_normal(documents)) for _ in range(n)] for n in (seeds, others)]
    return tuple([made(losses, tokens) for losses in group] for group in groups)


def test_with_one_seed_it_is_the_paired_difference():
    (ours,), (theirs,) = routers(1, 1)
    mean, interval = difference([ours], [theirs])
    expected, bounds = paired_difference(ours, theirs)
    assert mean == pytest.approx(expected)
    assert interval == pytest.approx(bounds)
    assert np.exp(loss_interval([ours])) == pytest.approx(ours.interval())


def test_it_is_what_loops_say():
    ours, theirs = routers(3, 2)
    drawn = resamples(7)
    picks = [np.random.default_rng((0, stream)).integers(n, size=(2000, n)) for stream, n in ((1, 3), (2, 2))]
    estimates = []
    for resample in range(2000):
        means = []
        for group, pick in zip((ours, theirs), picks, strict=True):
            tokens = sum(group[0].tokens[d] for d in drawn[resample])
            sums = [sum(group[s].loss[d] for d in drawn[resample]) for s in pick[resample]]
            means.append(sum(sums) / len(sums) / tokens)
        estimates.append(means[0] - means[1])
    mean, interval = difference(ours, theirs)
    assert mean == pytest.approx(mean_loss(ours) - mean_loss(theirs))
    assert interval == pytest.approx(tuple(np.quantile(estimates, [0.025, 0.975])))


def test_the_same_router_with_the_same_seed_repeated_adds_no_spread():
    (ours,), (theirs,) = routers(1, 1)
    assert difference([ours] * 3, [theirs])[1] == pytest.approx(paired_difference(ours, theirs)[1])


def test_seeds_that_differ_widen_the_interval_and_are_drawn_apart():
    tokens = np.full(6, 10.0)
    low, high, zero = (made(tokens * value, tokens) for value in (1.0, 2.0, 0.0))
    mean, interval = difference([low, high], [zero])
    assert mean == pytest.approx(1.5)
    assert interval == pytest.approx((1.0, 2.0))  # a resample has both seeds, or one of them twice
    assert difference([low, high], [low, high])[1] == pytest.approx((-1.0, 1.0)), "not paired between routers"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_what_must_hold(seed, ours, theirs):
    one, other = routers(ours, theirs, seed=seed)
    mean, (low, high) = difference(one, other)
    assert low <= high
    back, (below, above) = difference(other, one)
    assert back == pytest.approx(-mean)
    if ours == theirs == 1:
        assert (-above, -below) == pytest.approx((low, high))
    shifted = [made(each.loss + 0.5 * each.tokens, each.tokens) for each in one]
    assert difference(shifted, other)[0] == pytest.approx(mean + 0.5)
    assert difference(shifted, other)[1] == pytest.approx((low + 0.5, high + 0.5))
    assert math.isfinite(loss_interval(one)[0])


def test_accuracy_is_the_mean_over_tasks_and_resamples_items():
    draw = np.random.default_rng(0)
    ours, theirs = ([[draw.integers(0, 2, n).tolist() for n in (40, 60)] for _ in range(s)] for s in (2, 1))
    mean, (low, high) = accuracy_difference(ours, theirs)
    accuracy = [np.mean([[np.mean(task) for task in seed] for seed in each]) for each in (ours, theirs)]
    assert mean == pytest.approx(accuracy[0] - accuracy[1])
    assert low < mean < high
    # The plain formula for one seed: the variances of the items' differences, over tasks.
    mean, (low, high) = accuracy_difference(ours[:1], theirs)
    differences = [np.subtract(a, b) for a, b in zip(ours[0], theirs[0], strict=True)]
    error = math.sqrt(sum(d.var() / len(d) for d in differences)) / 2
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert accuracy_difference(theirs, theirs) == (0.0, (0.0, 0.0)), "paired: the same answers differ in no resample"
