"""Scores on tasks as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.table import Table

from buddy.console import results
from buddy.scoring.statistics import flipped

Entry = Mapping[str, Any]
FULL = 1.0  # the budget of the full depth


def show_tasks(entries: Sequence[Entry], title: str, sinks: int) -> None:
    """Print one row a task and one column a budget.

    Args:
        entries: as `task_scores` gives them.
        title: over the table.
        sinks: tokens of each sequence at full depth whatever the budget.
    """
    budgets = {entry["budget"]: entry["layers"] for entry in entries}
    table = Table(title=f"{title}: % right ± standard error, by budget (executed layers)")
    for heading in ("task", "metric"):
        table.add_column(heading)
    table.add_column("items", justify="right")
    for budget, layers in budgets.items():
        table.add_column(f"{budget:g} ({layers})", justify="right")
    tasks = {name: [entry for entry in entries if entry["task"] == name] for name in _names(entries)}
    for name, own in tasks.items():
        table.add_row(name, own[0]["metric"], str(own[0]["items"]), *map(_cell, own))
    _add_average(table, entries, budgets)
    _add_flips(table, entries, budgets)
    table.add_section()
    table.add_row("layers run", "min / mean / max", "", *(_executed(entries, budget) for budget in budgets))
    results.print(table)
    if sinks:
        results.print(f"Sink tokens, run at full depth and counted apart: {sinks} a sequence.")


def _names(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(entry["task"] for entry in entries))


def _cell(entry: Entry) -> str:
    if entry["correct"] is None:  # no share of right answers
        return f"{entry['value']:.4g}"
    error = "" if entry["stderr"] is None else f" ± {100 * entry['stderr']:.1f}"
    return f"{100 * entry['value']:.1f}{error}"


def _add_average(table: Table, entries: Sequence[Entry], budgets: Mapping[float, int]) -> None:
    shares = [entry for entry in entries if entry["correct"] is not None]
    if len(_names(shares)) < 2:
        return
    cells = []
    for budget in budgets:
        values = [entry["value"] for entry in shares if entry["budget"] == budget]
        cells.append(f"{100 * sum(values) / len(values):.1f}")
    table.add_section()
    table.add_row("average", "", "", *cells)


def _add_flips(table: Table, entries: Sequence[Entry], budgets: Mapping[float, int]) -> None:
    """The mean over tasks, where the full depth was scored too."""
    answers = {(entry["budget"], entry["task"]): entry["correct"] for entry in entries if entry["correct"] is not None}
    known = [name for name in _names(entries) if all((budget, name) in answers for budget in (FULL, *budgets))]
    if not known or len(budgets) < 2:
        return
    cells = []
    for budget in budgets:
        share = mean(mean(flipped(answers[FULL, name], answers[budget, name])) for name in known)
        cells.append("–" if budget == FULL else f"{100 * share:.1f}")
    table.add_row("flips", "against full depth", "", *cells)


def _executed(entries: Sequence[Entry], budget: float) -> str:
    """Over all tasks at a budget that have routed tokens; the mean is the tasks' mean."""
    counts = [entry["executed"] for entry in entries if entry["budget"] == budget]
    counts = [each for each in counts if each["min"] is not None]
    if not counts:
        return "–"
    least, most = min(each["min"] for each in counts), max(each["max"] for each in counts)
    return f"{least} / {sum(each['mean'] for each in counts) / len(counts):.2f} / {most}"
