"""Progress bars and status lines, all on the error stream so that results can be piped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

errors = Console(stderr=True)
results = Console(width=None if Console().is_terminal else 200)


def track(items: Sequence[Any], words: str) -> Iterator[Any]:
    """The items one by one, with a bar that tells how many are done and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task(words, total=len(items))
        for item in items:
            yield item
            progress.advance(task)


def tracker(words: str) -> Callable[[Sequence[Any]], Iterable[Any]]:
    """`track` with its words filled in."""
    return lambda items: track(items, words)


@contextmanager
def status(words: str) -> Iterator[None]:
    """A spinner while something of unknown length runs."""
    with errors.status(words):
        yield
