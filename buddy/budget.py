"""What a person asks for → the number of executed layers K."""

import re
from collections.abc import Sequence

from buddy.errors import BudgetError


def executed_layers(budget: float | int | str, layers: int, always_on: int) -> int:
    """K = round(b · L) for a fraction b in (0, 1], or n for the text "n layers" (2606.09514, section 3).

    Args:
        budget: a fraction (0.75, "0.75") or a count in words ("22layers", "22 layers").
        layers: L, the depth of the backbone.
        always_on: layers that run whatever the plan says, the least that can be asked for.

    Raises:
        BudgetError: not a budget, above full depth, or below the always-on layers.
    """
    least = f"{always_on}layers (a fraction of {always_on / layers:.3g})"
    count = _layer_count(budget)
    if count is None:
        fraction = _fraction(budget)
        if not 0 < fraction <= 1:
            raise BudgetError(f"The budget {budget} is not above 0 and at most 1; ask for a fraction such as 0.75.")
        count = round(fraction * layers)
    if count > layers:
        raise BudgetError(
            f"The budget {budget} is more than the backbone's {layers} layers; ask for {layers} or fewer."
        )
    if count < always_on:
        raise BudgetError(f"The budget {budget} is below the layers that always run; ask for {least} or more.")
    return count


def executed_grid(budgets: Sequence[float], layers: int, always_on: int) -> list[int]:
    """K for each budget of a recipe's grid, in its order."""
    return [executed_layers(budget, layers, always_on) for budget in budgets]


def _layer_count(budget: float | int | str) -> int | None:
    match = re.fullmatch(r"\s*(\d+)\s*layers?\s*", budget) if isinstance(budget, str) else None
    return int(match[1]) if match else None


def _fraction(budget: float | int | str) -> float:
    try:
        return float(budget)
    except ValueError:
        raise BudgetError(
            f"The budget {budget!r} is neither a fraction such as 0.75 nor a count such as 22layers."
        ) from None


def fraction_of(budget: float | int | str, executed: int, layers: int) -> float:
    """The fraction that a budget stands for: itself where it is one, else executed / layers."""
    return executed / layers if _layer_count(budget) is not None else float(budget)
