"""A budget → the number of executed layers K.

A fraction or a count determines K by itself. A latency needs a table of milliseconds per token, which the caller gives.
"auto" needs a budget predictor, which chooses K for each request.
"""

import math
import re
import reprlib
from collections.abc import Callable, Mapping

from buddy.errors import BudgetError

Budget = float | int | str
Table = Mapping[int, float]  # executed layers K → milliseconds a generated token

KINDS = "a fraction such as 0.75 nor a count such as 22layers, nor a latency such as 15ms, nor auto"
AUTO = "auto"


def executed_layers(budget: Budget, layers: int, always_on: int, table: Callable[[], Table] | None = None) -> int:
    """K = round(b · L) for a fraction b in (0, 1] (2606.09514, section 3), n for "n layers", what fits into "n ms".

    Args:
        budget: a fraction (0.75, "0.75"), a count ("22layers", "22 layers"), or milliseconds for each
            generated token ("15ms").
        layers: L, the depth of the backbone.
        always_on: layers that always run, the smallest K.
        table: gives the milliseconds that a token takes at each possible K; called for a latency only.

    Raises:
        BudgetError: not a budget, above full depth, below the always-on layers, a latency that no plan reaches or that
            there is no table for, or "auto", which stands for no fixed number of layers.
    """
    if auto_cap(budget):
        raise BudgetError(
            f"The budget {budget} is chosen for each request, by `buddy generate`, `buddy serve` and `buddy evaluate`; "
            "ask for a fraction such as 0.75 here."
        )
    latency = latency_of(budget)
    if latency is not None:
        if table is None:
            raise BudgetError(f"No latency was measured for {budget}; ask for a fraction such as 0.75.")
        return _within(latency, table())
    least = f"{always_on}layers (a fraction of {always_on / layers:.3g})"
    count = _count(budget)
    if count is None:
        count = round(_fraction(budget) * layers)
    if count > layers:
        raise BudgetError(
            f"The budget {budget} is more than the backbone's {layers} layers; ask for {layers} or fewer."
        )
    if count < always_on:
        raise BudgetError(f"The budget {budget} is below the layers that always run; ask for {least} or more.")
    return count


def check_budget(budget: Budget) -> None:
    """Find what is wrong with a budget whatever the model.

    Raises:
        BudgetError: not a budget, or out of the range of every model.
    """
    cap = auto_cap(budget)
    if cap is not None:
        check_budget(cap)
    elif latency_of(budget) is None and _count(budget) is None:
        _fraction(budget)


def latency_of(budget: Budget) -> float | None:
    """15.0 for "15ms" or "15 ms", milliseconds per token; None for another kind of budget.

    Raises:
        BudgetError: not above 0.
    """
    match = re.fullmatch(r"\s*([+-]?(\d+(\.\d*)?|\.\d+))\s*ms\s*", budget) if isinstance(budget, str) else None
    if not match:
        return None
    milliseconds = float(match[1])
    if not 0 < milliseconds < math.inf:
        raise BudgetError(
            f"The budget {str(budget).strip()} is not a time above 0; use a latency such as 15ms a token."
        )
    return milliseconds


def auto_cap(budget: Budget) -> Budget | None:
    """The cap of "auto", a budget that a predictor chooses for each request; None for another kind of budget.

    The cap of "auto:0.75" is "0.75", that of "auto" full depth.

    Raises:
        BudgetError: the cap is empty or "auto" again.
    """
    name, colon, cap = budget.partition(":") if isinstance(budget, str) else ("", "", "")
    if name.strip() != AUTO:
        return None
    if colon and (not cap.strip() or cap.strip().startswith(AUTO)):
        raise BudgetError(f"The budget {budget} has no cap after its colon; write auto, or a cap as in auto:0.75.")
    return cap.strip() or 1.0


def fraction_of(budget: Budget, executed: int, layers: int) -> float:
    """A budget as a fraction: itself where it is one, else executed / layers."""
    try:
        return float(budget)
    except ValueError:  # a unit
        return executed / layers


def format_budget(budget: Budget) -> str:
    """The canonical spelling of a budget: 0.75, 22layers, 15ms."""
    try:
        return f"{float(budget):g}"
    except ValueError:  # a unit
        return re.sub(r"layers?$", "layers", "".join(str(budget).split()))


def _within(latency: float, table: Table) -> int:
    """The most layers whose token takes at most so many milliseconds."""
    met = [count for count, taken in table.items() if taken <= latency]
    if met:
        return max(met)
    least = min(table, key=lambda count: (table[count], count))
    taken = _rounded_up(table[least])
    raise BudgetError(
        f"No plan is as fast as {latency:g} ms per token: {least} layers take {taken} ms per token here; ask for at "
        f"least {taken}ms."
    )


def _rounded_up(milliseconds: float) -> str:
    """Three digits, not below the number itself."""
    decimals = max(0, 2 - math.floor(math.log10(milliseconds)))
    return f"{math.ceil(milliseconds * 10**decimals) / 10**decimals:.{decimals}f}"


def _count(budget: Budget) -> int | None:
    """22 for "22layers"; None for another kind of budget."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*layers?\s*", str(budget))
    return int(match[1]) if match else None


def _fraction(budget: Budget) -> float:
    try:
        fraction = float(budget)
    except (TypeError, ValueError):
        raise BudgetError(f"The budget {reprlib.repr(budget)} is neither {KINDS}; use 0.75, for example.") from None
    if not 0 < fraction <= 1:
        raise BudgetError(
            f"The budget {budget} is not above 0 and at most 1; ask for a fraction such as 0.75, or for layers as in "
            "22layers."
        )
    return fraction
