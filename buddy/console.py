"""Progress bars and messages on the error stream, tables on the output stream, so that results can be piped."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

from buddy.io import write_json

Track = Callable[[Sequence[Any]], Iterable[Any]]  # wraps what a loop runs over, to show its progress

PLAIN_EVERY = 30.0  # seconds between lines where the error stream is no terminal
NONE = "–"  # a cell without a value
WIDTH, GAP, LONGEST = 118, 2, 30  # columns of a table where there is no terminal, between two, and of row labels

# No markup: paths may contain brackets. Messages are not wrapped, so that paths can be copied.
stderr = Console(stderr=True, markup=False, emoji=False, soft_wrap=True)
stdout = Console(width=None if Console().is_terminal else 200, markup=False, emoji=False, soft_wrap=True)


class Bar:
    """A progress bar with steps done, time elapsed and time left; a context manager.

    If the error stream is not a terminal, it prints a plain line every `PLAIN_EVERY` seconds and one at the end.

    Args:
        description: of the work.
        total: steps.
        done: steps already done.
    """

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._live = stderr.is_terminal
        self._progress = Progress(*columns, console=stderr, disable=not self._live, speed_estimate_period=120)
        name = description[:1].upper() + description[1:]
        self._progress.add_task(name, total=total, completed=done, note="")
        self._printed_at = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if not self._live:
            self._print_line()

    def update(self, done: int, note: str = "") -> None:
        """Show the steps done so far, and `note` at the end of the line."""
        task = self._progress.tasks[0]
        self._progress.update(task.id, completed=done, note=note)
        # The last line is printed at the end.
        if not self._live and not task.finished and time.monotonic() - self._printed_at >= PLAIN_EVERY:
            self._print_line()

    def _print_line(self) -> None:
        self._printed_at = time.monotonic()
        task = self._progress.tasks[0]
        parts = [f"{task.description}: {task.completed:.0f} of {task.total:.0f}", f"{clock(task.elapsed)} elapsed"]
        if not task.finished and task.time_remaining is not None:
            parts.append(f"{clock(task.time_remaining)} left")
        note = task.fields["note"]
        stderr.print(", ".join([*parts, note] if note else parts))


def track(items: Sequence[Any], description: str) -> Iterator[Any]:
    """The items one by one, with a `Bar`."""
    with Bar(description, len(items)) as bar:
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(done)


def tracker(description: str) -> Track:
    """`track` with its description filled in."""
    return lambda items: track(items, description)


def status(description: str) -> Status:
    """A spinner while something of unknown length runs."""
    return stderr.status(Text(description))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns without markup."""
    # In a pipe or file each row is one line of any length.
    console = Console(highlight=False, width=None if stdout.is_terminal else 1000)
    table = Table(*heads, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def print_titled_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    """Print a table to the output stream, split into parts if it is wider than the terminal.

    Args:
        title: above the table.
        head: the first column labels the rows; the others are numbers, aligned right.
        rows: as many cells as `head`.
        note: below the table.
    """
    width = stdout.width if stdout.is_terminal else WIDTH
    stdout.print(f"\n{title}")
    for part in _fitting(head, rows, width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(head[0], max_width=LONGEST, overflow="fold")
        for place in part:
            table.add_column(head[place], justify="right", no_wrap=len(part) > 1)
        for row in rows:
            table.add_row(row[0], *(row[place] for place in part))
        stdout.print(table, soft_wrap=False)
    if note:
        stdout.print(note, width=width, soft_wrap=False)


def report_json(path: Path | None, value: Any) -> None:
    """Write results to the file that was asked for, if one was, and name it.

    Call it before printing tables: who reads them may close the pipe.
    """
    if path:
        write_json(path, value)
        stdout.print(f"JSON: {path}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice on devices, workers and intervals from the terminal within this block.

    A profiler's report is shown.
    """
    wanted = {"lightning.pytorch": "ERROR", "lightning.fabric": "ERROR", "lightning.pytorch.profilers": "INFO"}
    loggers = [logging.getLogger(name) for name in wanted]
    levels = [logger.level for logger in loggers]
    for logger, word in zip(loggers, wanted.values(), strict=True):
        logger.setLevel(word)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning", message=".*(num_workers|logging interval).*")
        warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # scores are gathered before they are logged
        warnings.filterwarnings("ignore", message=".*treespec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", message="FSDP2-wrapped .* view")  # true, and nothing writes into it
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def counted(number: int, noun: str) -> str:
    """ "1 token", "2 tokens"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def quality_cells(perplexity: float, interval: Sequence[float], kl: float) -> list[str]:
    """Perplexity, the ends of its interval as in "29.12 – 30.41", or "–" over one document, and KL."""
    low, high = interval
    return [f"{perplexity:.2f}", f"{low:.2f} – {high:.2f}" if low < high else NONE, f"{max(kl, 0.0):.4f}"]


def clock(seconds: float | None) -> str:
    """Seconds as hours, minutes and seconds, as in 0:02:05."""
    return str(timedelta(seconds=round(seconds or 0)))


def _fitting(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Indices of the columns after the first, in groups that each fit into the width beside the first."""
    widths = [max(map(len, column)) + GAP for column in zip(head, *rows, strict=True)]
    first = min(widths[0], LONGEST + GAP)
    parts: list[list[int]] = [[]]
    used = first
    for place in range(1, len(widths)):
        if used + widths[place] > width and parts[-1]:
            parts.append([])
            used = first
        parts[-1].append(place)
        used += widths[place]
    return parts
