"""What people ask for, and the layers it stands for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddy.budget import executed_grid, executed_layers, fraction_of
from buddy.errors import BudgetError


@pytest.mark.parametrize(
    ("budget", "layers"),
    [(1.0, 30), (0.875, 26), (0.75, 22), (0.625, 19), (0.5, 15), ("0.5", 15), ("22layers", 22), ("22 layers", 22)],
)
def test_known_budgets_of_thirty_layers(budget, layers):
    assert executed_layers(budget, 30, 2) == layers


@given(st.floats(0.1, 1.0), st.integers(20, 100))
def test_a_fraction_is_rounded_to_the_nearest_count(budget, layers):
    assert abs(executed_layers(budget, layers, 2) - budget * layers) <= 0.5


def test_a_grid_keeps_its_order():
    assert executed_grid([0.5, 1.0], 30, 2) == [15, 30]


def test_a_count_is_told_back_as_a_fraction():
    assert fraction_of("15layers", 15, 30) == 0.5
    assert fraction_of("0.51", 15, 30) == 0.51


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (1.5, "not above 0 and at most 1"),
        (0, "not above 0"),
        (float("nan"), "not above 0"),
        (0.05, "below the layers that always run; ask for 4layers"),
        ("3layers", "below the layers that always run"),
        ("31layers", "more than the backbone's 30 layers"),
        ("half", "neither a fraction"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(budget, words):
    with pytest.raises(BudgetError, match=words):
        executed_layers(budget, 30, 4)
