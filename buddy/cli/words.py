"""What verbs do alike: lists of words, options that do not go together, tables."""

from typing import Any

from buddy import distributed
from buddy.errors import BuddyError, BudgetError


def words(text: str) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def refuse(options: dict[str, Any], why: str) -> None:
    """Raise `BuddyError` for the first option that was given."""
    for name, value in options.items():
        if value is not None:
            raise BuddyError(f"--{name.replace('_', '-')} {why}.")


def alone(what: str) -> None:
    """Raise `BuddyError` where torchrun began several processes for what is done by one."""
    launched = distributed.torchrun_world_size()
    if launched > 1:
        raise BuddyError(
            f"{what} by one process, not by {launched}; give the command without torchrun (fit and evaluate go with "
            "it, and compare has --jobs)."
        )


def budgets_of(budgets: str | None) -> list[str] | None:
    """The words of --budgets, None where it was not given."""
    if budgets is None:
        return None
    asked = words(budgets)
    if not asked:
        raise BudgetError("--budgets is empty; name at least one, such as --budgets 0.75,0.5.")
    return asked
