"""Quality over executed layers, and over measured time: a panel for each text, a line for each router."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from buddy.comparison.view import Comparison
from buddy.evaluation.figure import band, figure_at

LAYERS, TIME = "quality-layers", "quality-time"
ACROSS = 2  # panels beside each other
# Told apart by people who see few colours (Paul Tol's "muted" and "bright"); lines of one colour differ in their marks.
COLOURS: tuple[str, ...] = ("#332288", "#cc6677", "#117733", "#ddaa33", "#88ccee", "#882255")
COLOURS += ("#44aa99", "#999933", "#aa4499", "#555555", "#e6550d", "#000000")
MARKS = "osD^vPX*<>hd"
STROKES = {"learned": "-", "static": "--", "random": ":"}
Point = tuple[float, float, float, float]  # x, loss, low, high


def draw_all(comparison: Comparison, folder: Path, prefix: str = "") -> dict[str, Path]:
    """Write the figures into a folder; their paths by name. Without measured times there is no figure of time."""
    figures = {LAYERS: draw_layers}
    if comparison.record["speed"]:
        figures[TIME] = draw_time
    paths = {name: folder / f"{prefix}{name}.png" for name in (LAYERS, TIME)}
    for name, path in paths.items():
        if name in figures:
            figures[name](comparison, path)
        else:
            path.unlink(missing_ok=True)  # of an earlier comparison
    return {name: paths[name] for name in figures}


def draw_layers(c: Comparison, path: Path) -> None:
    """Cross-entropy over K, with 95 % intervals over documents and seeds as bands."""

    def points(label: str, domain: str) -> list[Point]:
        found = [(layers, c.loss(label, domain, budget)) for budget, layers in c.budgets.items()]
        return sorted((layers, *loss) for layers, loss in found if loss)

    _draw(c, path, points, "executed layers", {"integer": True}, shade=0.1)


def draw_time(c: Comparison, path: Path) -> None:
    """Cross-entropy over the milliseconds of a decoded token; without bands, since times differ too."""

    def points(label: str, domain: str) -> list[Point]:
        found = [
            (times["decode_ms"], *loss)
            for budget, layers in c.budgets.items()
            if (times := c.speed(label, layers)) and (loss := c.loss(label, domain, budget))
        ]
        return sorted(found)

    stock = c.record["speed"]["dense"]["decode_ms"]
    _draw(c, path, points, "milliseconds a token, decoding one text", {}, stock=stock)


def _draw(
    c: Comparison,
    path: Path,
    points: Callable[[str, str], list[Point]],
    x: str,
    ticks: Mapping[str, Any],
    *,
    shade: float = 0.0,
    stock: float | None = None,
) -> None:
    from matplotlib.ticker import MaxNLocator

    across = min(ACROSS, len(c.domains))
    down = -(-len(c.domains) // across)
    size = {"figsize": (5.2 * across + 0.6, 3.6 * down + 0.5 + 0.22 * -(-len(c.labels) // (2 * across)))}
    with figure_at(path, ncols=across, nrows=down, squeeze=False, **size) as axes:
        panels = list(axes.flat)
        for axis, domain in zip(panels, c.domains, strict=False):
            lines = {label: points(label, domain) for label in c.labels}
            for (label, line), style in zip(lines.items(), _styles(c), strict=True):
                if line:
                    band(axis, line, shade, label=label, **style)
            if stock is not None:
                axis.axvline(stock, color="#888888", linewidth=1, linestyle="-.", label="stock dense model")
            _limit(axis, lines, shade)
            axis.set_title(domain, fontsize=10, parse_math=False)
            axis.set(xlabel=x, ylabel="cross-entropy (nats a token)")
            axis.xaxis.set_major_locator(MaxNLocator(**ticks))
            axis.grid(alpha=0.3)
        for axis in panels[len(c.domains) :]:
            axis.remove()
        handles, labels = panels[0].get_legend_handles_labels()
        figure = panels[0].figure
        figure.legend(handles, labels, loc="outside lower center", ncols=2 * across, frameon=False, fontsize=9)


def _limit(axis: Any, lines: Mapping[str, list[Point]], shade: float) -> None:
    """Keep the panel to where most routers are: a line that is far worse leaves it at the top."""
    worst = [max(point[1] for point in line) for line in lines.values() if len(line) > 1]
    least = min(point[1] for line in lines.values() for point in line)
    if worst and max(worst) - least > 2.5 * (plain.median(worst) - least):
        span = 1.5 * (plain.median(worst) - least)
        lowest = min(point[2] for line in lines.values() for point in line) if shade else least
        axis.set_ylim(bottom=lowest - 0.05 * span, top=least + span)


def _styles(c: Comparison) -> list[dict[str, Any]]:
    """For each router, in order: its kind decides the stroke."""
    colours, marks = cycle(COLOURS), cycle(MARKS)
    return [
        {
            "color": next(colours),
            "marker": next(marks),
            "linestyle": STROKES.get(c.routers[label]["kind"], "-"),
            "linewidth": 2.0 if c.routers[label]["kind"] == "learned" else 1.3,
            "markersize": 5,
        }
        for label in c.labels
    ]
