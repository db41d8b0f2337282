"""What verbs do alike: lists of words, options that do not go together, tables."""

from collections.abc import Sequence
from typing import Any

from buddy import distributed as processes
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
    if processes.from_torchrun() > 1:
        raise BuddyError(
            f"{what} by one process, not by {processes.from_torchrun()}; give the command without torchrun (fit and "
            "evaluate go with it, and compare has --jobs)."
        )


def budgets_of(budgets: str | None) -> list[str] | None:
    """The words of --budgets, None where it was not given."""
    if budgets is None:
        return None
    asked = words(budgets)
    if not asked:
        raise BudgetError("--budgets is empty; name at least one, such as --budgets 0.75,0.5.")
    return asked


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns that line up; brackets in a cell are no markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=1000)  # into a pipe or file: one line a row, whatever its length
    table = Table(*heads, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a cell are no markup
    console.print(table)
