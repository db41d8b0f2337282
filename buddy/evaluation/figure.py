"""Figures by matplotlib, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from buddy.io import write_bytes


@contextmanager
def figure_at(path: Path, **options: Any) -> Iterator[Any]:
    """The axes of a new figure, saved to `path` (PNG) when the block ends without an error.

    Args:
        path: where the figure goes; an older one there is replaced at once.
        options: of `matplotlib.pyplot.subplots`.

    Raises:
        RunError: the place cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained", **options)
    try:
        yield axes
        picture = BytesIO()
        figure.savefig(picture, dpi=150, format="png")
        write_bytes(path, picture.getvalue())
    finally:
        pyplot.close(figure)


def band(axes: Any, points: Sequence[tuple[float, float, float, float]], shade: float = 0.15, **style: Any) -> None:
    """A line through (x, y, low, high), the area between low and high shaded.

    Args:
        axes: of matplotlib.
        points: in the order of x.
        shade: how much ink the area gets, up to 1.
        style: of the line.
    """
    x, y, low, high = zip(*points, strict=True)
    (line,) = axes.plot(x, y, **({"marker": "o"} | style))
    axes.fill_between(x, low, high, color=line.get_color(), alpha=shade, linewidth=0)
