"""The bootstrap over documents and seeds against loops, against a formula, and against what must hold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy.metrics.statistics import (
    RESAMPLES,
    accuracy_difference,
    difference,
    flips,
    loss_interval,
    mean_loss,
    quantiles,
    resamples,
)


def routers(seeds: int, others: int, documents: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses (seeds, documents) of two routers that share the difficulty of documents, and tokens (documents,)."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(20, 60, documents).astype(float)
    common = 3 + draw.standard_normal(documents)
    ours, theirs = (tokens * (common + 0.3 * draw.standard_normal((n, documents))) for n in (seeds, others))
    return ours, theirs, tokens


def test_it_is_what_loops_say():
    ours, theirs, tokens = routers(3, 2)
    drawn = resamples(7)
    picks = [np.random.default_rng((0, stream)).integers(n, size=(RESAMPLES, n)) for stream, n in ((1, 3), (2, 2))]
    estimates = []
    for resample in range(RESAMPLES):
        means = []
        for losses, pick in zip((ours, theirs), picks, strict=True):
            sums = [sum(losses[seed][document] for document in drawn[resample]) for seed in pick[resample]]
            means.append(sum(sums) / len(sums) / sum(tokens[document] for document in drawn[resample]))
        estimates.append(means[0] - means[1])
    mean, interval = difference(ours, theirs, tokens)
    assert mean == pytest.approx(mean_loss(ours, tokens) - mean_loss(theirs, tokens))
    assert interval == pytest.approx(tuple(np.quantile(estimates, [0.025, 0.975])))


def test_with_one_seed_documents_alone_are_drawn():
    ours, theirs, tokens = routers(1, 1)
    drawn = resamples(7)
    paired = (ours - theirs)[0]
    expected = quantiles(paired[drawn].sum(1) / tokens[drawn].sum(1))
    assert difference(ours, theirs, tokens)[1] == pytest.approx(expected)
    assert difference(np.repeat(ours, 3, 0), theirs, tokens)[1] == pytest.approx(expected), "one seed, repeated"
    assert difference(ours, ours, tokens) == (0.0, (0.0, 0.0))


def test_seeds_that_differ_widen_the_interval_and_are_drawn_apart():
    tokens = np.full(6, 10.0)
    both, zero = np.outer([1.0, 2.0], tokens), np.zeros((1, 6))
    mean, interval = difference(both, zero, tokens)
    assert mean == pytest.approx(1.5)
    assert interval == pytest.approx((1.0, 2.0))  # a resample has both seeds, or one of them twice
    assert difference(both, both, tokens)[1] == pytest.approx((-1.0, 1.0)), "not paired between routers"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4))
def test_what_must_hold(seed, ours, theirs):
    one, other, tokens = routers(ours, theirs, seed=seed)
    mean, (low, high) = difference(one, other, tokens)
    assert low <= high
    back, (below, above) = difference(other, one, tokens)
    assert back == pytest.approx(-mean)
    if ours == theirs == 1:
        assert (-above, -below) == pytest.approx((low, high))
    shifted = difference(one + 0.5 * tokens, other, tokens)
    assert shifted[0] == pytest.approx(mean + 0.5)
    assert shifted[1] == pytest.approx((low + 0.5, high + 0.5))
    assert math.isfinite(loss_interval(one, tokens)[0])


def test_the_interval_of_many_documents_is_that_of_the_normal_law():
    losses = np.random.default_rng(0).normal(3.0, 1.0, (1, 400))
    low, high = loss_interval(losses, np.ones(400))
    assert (high - low) / 2 == pytest.approx(1.96 * losses.std() / 20, rel=0.1)


def test_accuracy_is_the_mean_over_tasks_and_resamples_items():
    draw = np.random.default_rng(0)
    ours, theirs = ([draw.integers(0, 2, (seeds, items)) for items in (40, 60)] for seeds in (2, 1))
    mean, (low, high) = accuracy_difference(ours, theirs)
    accuracy = [np.mean([task.mean(1) for task in tasks]) for tasks in (ours, theirs)]
    assert mean == pytest.approx(accuracy[0] - accuracy[1])
    assert low < mean < high
    # The plain formula for one seed: the variances of the items' differences, over tasks.
    first = [task[:1] for task in ours]
    mean, (low, high) = accuracy_difference(first, theirs)
    differences = [(a - b)[0] for a, b in zip(first, theirs, strict=True)]
    error = math.sqrt(sum(d.var() / len(d) for d in differences)) / 2
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert accuracy_difference(theirs, theirs) == (0.0, (0.0, 0.0)), "paired: the same answers differ in no resample"


def test_an_answer_that_turns_either_way_is_a_flip():
    assert flips([1, 1, 0, 0], [1, 0, 1, 0]).tolist() == [0, 1, 1, 0]
    with pytest.raises(ValueError, match="items"):
        flips([1, 0], [1])
