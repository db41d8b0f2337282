"""What people ask for, and the layers it stands for."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buddy.budget import auto_cap, executed_layers, format_budget, fraction_of, latency_of
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


@pytest.mark.parametrize(
    ("budget", "fraction", "words"),
    [
        (0.75, 0.75, "0.75"),
        ("0.510", 0.51, "0.51"),
        (1.0, 1.0, "1"),
        ("15 layers", 0.5, "15layers"),
        ("15layer", 0.5, "15layers"),
        ("15 ms", 0.5, "15ms"),
    ],
)
def test_budgets_are_shown_in_one_way_and_as_a_fraction(budget, fraction, words):
    assert format_budget(budget) == words
    assert fraction_of(budget, 15, 30) == fraction


@pytest.mark.parametrize("budget", [1.5, 0, float("nan"), 0.05, "3layers", "31layers", "half", [0.5, 1.0]])
def test_a_budget_that_cannot_be_met_is_refused(budget):
    with pytest.raises(BudgetError, match=re.escape(str(budget))):
        executed_layers(budget, 30, 4)


# Latencies

TABLE = {2: 4.06, 3: 5.0, 4: 6.0, 5: 7.0}


@pytest.mark.parametrize(
    ("budget", "layers"), [("4.06ms", 2), ("5.99 ms", 3), (" 6ms", 4), ("6.0ms", 4), ("7ms", 5), ("1000ms", 5)]
)
def test_a_latency_is_the_most_layers_that_it_leaves_time_for(budget, layers):
    assert executed_layers(budget, 5, 2, lambda: TABLE) == layers


@given(st.floats(4.06, 100))
def test_no_latency_is_passed_and_none_is_wasted(milliseconds):
    layers = executed_layers(f"{milliseconds:f}ms", 5, 2, lambda: TABLE)
    assert TABLE[layers] <= float(f"{milliseconds:f}")
    assert layers == 5 or TABLE[layers + 1] > float(f"{milliseconds:f}")


@given(st.floats(0.001, 5000))
def test_what_is_asked_for_in_place_of_too_little_suffices(fastest):
    table = {2: fastest, 3: fastest + 1}
    with pytest.raises(BudgetError, match="at least") as refused:
        executed_layers(f"{fastest * 0.9:.9f}ms", 3, 2, lambda: table)
    advice = str(refused.value).rpartition("at least ")[2].rstrip(".")
    assert executed_layers(advice, 3, 2, lambda: table) >= 2
    assert latency_of(advice) < fastest * 1.011 + 0.01


def test_the_table_is_not_asked_for_other_budgets():
    assert executed_layers("0.5", 30, 2, lambda: 1 / 0) == 15


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        *((text, text) for text in ("0ms", "-3ms", "15parsecs", "75%", "nanms", "ms", "1,5ms", "auto")),
        ("9" * 50 + "layers", "999"),
        ("4ms", "4.06ms"),
    ],
)
def test_a_latency_that_cannot_be_met_is_refused(budget, words):
    with pytest.raises(BudgetError, match=re.escape(words)):
        executed_layers(budget, 5, 2, lambda: TABLE)


def test_a_latency_needs_a_table():
    with pytest.raises(BudgetError, match="15ms"):
        executed_layers("15ms", 30, 2)


def test_auto_and_its_cap():
    caps = {"auto": 1.0, " auto : 0.75 ": "0.75", "auto:22layers": "22layers", "automatic": None, 0.75: None}
    assert {budget: auto_cap(budget) for budget in caps} == caps
    for budget in ("auto:", "auto:auto"):
        with pytest.raises(BudgetError, match="auto:"):
            auto_cap(budget)
