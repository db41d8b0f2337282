"""A table as text in cells: printed in parts that fit the terminal, or written as Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table

from buddy.console import results

WIDTH, GAP = 118, 2  # columns of a terminal that are counted on where there is none; between two columns
LONGEST = 30  # columns for the routers' labels


@dataclass(frozen=True)
class Grid:
    """A table: the first column says what a row is, the others are numbers."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def show(grid: Grid) -> None:
    """Print a table, in several parts one below the other where it is wider than the terminal."""
    width = results.width if results.is_terminal else WIDTH
    results.print(f"\n{grid.title}", soft_wrap=True)
    for part in _parts(grid, width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(part.head[0], max_width=LONGEST, overflow="fold")
        for heading in part.head[1:]:
            table.add_column(heading, justify="right", no_wrap=len(part.head) > 2)
        for row in part.rows:
            table.add_row(*row)
        results.print(table)
    if grid.note:
        results.print(grid.note, width=width)


def markdown(grid: Grid) -> str:
    """The table in Markdown, without title and note."""
    lines = [grid.head, ("---", *("---:" for _ in grid.head[1:])), *grid.rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|').strip() for cell in line)} |\n" for line in lines)


def number(value: float) -> str:
    """A positive number with about four digits: 27.78, 185.0, 31130, 1.2e6."""
    if value >= 99999.5:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:.0f}" if value >= 999.95 else f"{value:.1f}" if value >= 99.995 else f"{value:.2f}"


def _parts(grid: Grid, width: int) -> list[Grid]:
    """The grid with as many columns at once as fit, the first always."""
    columns = list(zip(grid.head, *grid.rows, strict=True))
    widths = [max(map(len, column)) + GAP for column in columns]
    widths[0] = min(widths[0], LONGEST + GAP)
    parts, used = [[0]], widths[0]
    for place in range(1, len(columns)):
        if used + widths[place] > width and len(parts[-1]) > 1:
            parts.append([0])
            used = widths[0]
        parts[-1].append(place)
        used += widths[place]
    return [
        Grid(grid.title, tuple(grid.head[p] for p in part), tuple(tuple(row[p] for p in part) for row in grid.rows))
        for part in parts
    ]
