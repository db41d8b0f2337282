"""Ways of choosing, and the coin that they are held against."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buddy.metrics.statistics import mixed
from studies.predictor_choices import (
    Measured,
    along,
    by_epsilon,
    by_price,
    choices,
    compared,
    hull,
    layers_at,
    prices,
    thresholds,
)

ARMS = np.array([9, 7, 5, 2])


def measured(gap: float, rows: int = 80, told: bool = True) -> Measured:
    """Easy windows whose loss rises little and hard ones whose loss rises `gap` times as fast; features tell which."""
    random = np.random.default_rng(0)
    hard = np.arange(rows) % 2
    slope = np.where(hard, gap, 1.0)[:, None] * (1 + 0.05 * random.normal(size=(rows, 1)))
    losses = 3 + slope * np.array([0.0, 0.1, 0.3, 1.0])
    features = torch.from_numpy(random.normal(size=(rows, 6))).float()
    if told:
        features[:, 0] = torch.from_numpy(hard).float() * 4
    documents = [("one" if row < rows // 2 else "two", row // 2) for row in range(rows)]
    return Measured(ARMS, losses, features, 3, [domain for domain, _ in documents], documents)


@pytest.fixture
def quick(monkeypatch):
    """One policy, of a few steps; policies have tests of their own."""
    monkeypatch.setattr("studies.predictor_choices.POLICIES", 2)
    monkeypatch.setattr("studies.predictor_choices.POLICY", {"steps": 3, "lr": 1e-3})
    monkeypatch.setattr("studies.predictor_choices.RESAMPLES", 100)


# The coin


@given(st.dictionaries(st.integers(1, 30), st.floats(0, 5), min_size=2, max_size=7), st.floats(0, 1))
def test_no_pair_of_budgets_beats_the_coin(points, where):
    layers = min(points) + where * (max(points) - min(points))
    found = mixed(points, layers)
    pairs = [(a, b) for a in points for b in points if a <= layers <= b]
    chords = [points[a] if a == b else np.interp(layers, [a, b], [points[a], points[b]]) for a, b in pairs]
    assert found == pytest.approx(min(chords), abs=1e-9)


def test_outside_of_the_budgets_there_is_no_coin():
    assert mixed({5: 1.0, 9: 0.5}, 4.9) is None
    assert mixed({5: 1.0}, 5) is None
    assert layers_at({5: 1.0, 9: 0.5}, 0.4) is None
    assert layers_at({5: 1.0, 9: 0.5}, 0.75) == pytest.approx(7)


def test_the_hull_leaves_out_what_a_coin_beats():
    layers, losses = hull({2: 3.0, 5: 2.5, 7: 1.0, 9: 0.5})
    assert layers.tolist() == [2, 7, 9]
    assert losses.tolist() == [3.0, 1.0, 0.5]


def test_a_lucky_setting_does_not_help():
    """The coin may pick its luck; whoever is swept may not."""
    points = [(2.0, 3.0), (4.0, 1.0), (5.0, 2.0), (9.0, 0.5)]
    assert along(points, 2.0) == pytest.approx(5.0)
    assert layers_at(dict(points), 2.0) == pytest.approx(3.0)
    assert along(points, 0.4) is None


@given(st.integers(0, 50), st.floats(0.0, 2.0))
def test_a_price_buys_the_cheapest_sum(seed, price):
    increase = np.random.default_rng(seed).exponential(size=(5, 4))
    costs = increase + price * ARMS
    assert np.allclose(costs[np.arange(5), by_price(increase, ARMS, price)], costs.min(1))


def test_the_sweeps_go_from_all_layers_to_the_fewest():
    increase = measured(5.0).increase
    for rule, settings in ((by_epsilon, thresholds(increase)), (by_price, prices(increase, ARMS))):
        means = [ARMS[rule(increase, ARMS, setting)].mean() for setting in settings]
        assert means == sorted(means, reverse=True)
        assert means[0] > 8.5
        assert means[-1] < 2.5


# The study


def test_where_requests_differ_and_features_tell_there_is_something_to_win(quick):
    data = measured(gap=8.0)
    report = compared(data, choices(data))
    row = next(row for row in report["fixed"] if row["layers"] == 5)
    for way in ("regress", "priced", "hindsight"):
        assert row["ways"][way]["interval"][0] > 0, way
        assert row["ways"][way]["layers"] < 5
    assert row["ways"]["hindsight"]["saved"] >= row["ways"]["priced"]["saved"] - 1e-6


def test_where_features_tell_nothing_nothing_is_won(quick):
    data = measured(gap=8.0, told=False)
    report = compared(data, choices(data))
    row = next(row for row in report["fixed"] if row["layers"] == 5)
    assert row["ways"]["regress"]["interval"][0] <= 0.05
    assert row["ways"]["hindsight"]["interval"][0] > 0.3


def test_fixed_budgets_save_nothing_against_themselves(quick):
    data = measured(gap=3.0)
    five = [np.full(80, 2)]
    report = compared(data, {"regress": [np.full(80, place) for place in range(4)], "five": five})
    assert all(abs(row["ways"]["regress"]["saved"]) < 1e-9 for row in report["fixed"])
    assert report["single"]["five"]["layers"] == 5
    assert abs(report["single"]["five"]["saved"]) < 1e-9
