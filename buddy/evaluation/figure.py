"""Figures by matplotlib, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def figure_at(path: Path, **options: Any) -> Iterator[Any]:
    """The axes of a new figure, saved to `path` (PNG) when the block ends without an error.

    Args:
        path: where the figure goes; an older one there is replaced at once.
        options: of `matplotlib.pyplot.subplots`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained", **options)
    try:
        yield axes
        beside = path.with_name(f".{path.name}")
        figure.savefig(beside, dpi=150, format="png")
        beside.replace(path)
    finally:
        pyplot.close(figure)
