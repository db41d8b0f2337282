"""Figures by matplotlib, and results for TensorBoard."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd

from buddy.evaluation.results import Results
from buddy.io import tensorboard_writer, write_bytes, writing
from buddy.metrics.perplexity import Scores
from buddy.values import shown

LAYERS, TIME, PREFILL, WORK = "quality-layers", "quality-time", "quality-prefill", "quality-work"
CAPTIONS = {
    LAYERS: "Cross-entropy over executed layers; these are the mean over all tokens of the windows. With at most eight "
    "routers, bands are 95 % intervals over documents and seeds. A line that is far worse than the others leaves its "
    "panel at the top; the tables contain it.",
    TIME: "Cross-entropy over the measured time of a decoded token, one point for each budget.",
    PREFILL: "Cross-entropy over the measured time of a prompt, one point for each budget.",
    WORK: "Cross-entropy over multiply-adds per token, one point for each budget.",
}
MEASURED = {  # figures over measured columns of `Results.scores`, with the label of the horizontal axis
    TIME: ("decode_ms", "milliseconds per token, decoding one text"),
    PREFILL: ("prefill_ms", "milliseconds, reading one text"),
    WORK: ("multiply_adds", "multiply-adds per token (millions), without the head"),
}
# For readers with colour blindness (Paul Tol's "muted" and "bright"); lines of one colour differ in their marks.
COLOURS: tuple[str, ...] = ("#332288", "#cc6677", "#117733", "#ddaa33", "#88ccee", "#882255")
COLOURS += ("#44aa99", "#999933", "#aa4499", "#555555", "#e6550d", "#000000")
MARKS = "osD^vPX*<>h"  # 11 beside 12 colours: a pair repeats after 132 lines
STROKES = {"learned": "-", "static": "--", "random": ":"}
BANDS = 8  # routers at most: more bands hide the lines
FIGURE = "loss.png"  # of a run
TENSORBOARD, PICTURES = "tensorboard", "_figures"  # folders
TABLE = "hparams"  # prefix of the tags that are columns of TensorBoard's table and points of no curve


@contextmanager
def figure_at(path: Path, **options: Any) -> Iterator[Any]:
    """The axes of a new figure, written atomically to `path` (PNG) when the block ends without an error.

    Args:
        path: of the PNG file; an older one is replaced.
        options: of `matplotlib.pyplot.subplots`.

    Raises:
        RunError: the file cannot be written.
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


def draw_all(results: Results, folder: Path, prefix: str = "") -> dict[str, Path]:
    """Write the figures of a comparison into a folder; without measurements there is only the one over layers.

    Returns:
        Their paths by name.
    """
    paths = {name: folder / f"{prefix}{name}.png" for name in CAPTIONS}
    _draw_panels(results, paths[LAYERS], "executed_mean", "executed layers", shade=0.1)
    for name, (column, label) in MEASURED.items():
        if results.scores[column].isna().all():
            with writing(path := paths.pop(name)):
                path.unlink(missing_ok=True)  # of an earlier comparison
            continue
        stock = results.record["speed"]["dense"].get(column)
        _draw_panels(results, paths[name], column, label, stock=stock)
    return paths


def _draw_panels(r: Results, path: Path, x: str, label: str, *, shade: float = 0.0, stock: float | None = None) -> None:
    """Cross-entropy over a column of `Results.scores`: a panel for each text, a line for each router.

    Args:
        r: the results.
        path: of the PNG file.
        x: the column.
        label: of the horizontal axis.
        shade: opacity of the 95 % intervals over documents and seeds, drawn for at most BANDS routers.
        stock: position of the stock dense model on the horizontal axis, if any.
    """
    from matplotlib.ticker import MaxNLocator

    across = min(2, len(r.texts))
    down = -(-len(r.texts) // across)
    width, entries = 5.2 * across + 0.6, len(r.routers) + (stock is not None)
    place: dict[str, Any] = {"loc": "center", "bbox_to_anchor": (0.5, 0, 0.5, 1 / down)}
    ncols, below, fontsize = 1, 0.0, min(9.0, 170 / entries)
    if len(r.texts) == across * down:  # otherwise the legend takes the panel without a text
        longest = max(map(len, r.routers.index))
        ncols, fontsize = max(1, min(entries, int(width / (0.7 + 0.08 * longest)))), 9.0  # inches: a mark, a letter
        below, place = 0.5 + 0.2 * -(-entries // ncols), {"loc": "outside lower center"}
    size = (width, 3.6 * down + below)
    shade = shade if len(r.routers) <= BANDS else 0.0
    columns = [x, "loss", "loss_low", "loss_high"]
    with figure_at(path, ncols=across, nrows=down, squeeze=False, figsize=size) as axes:
        panels = list(axes.flat)
        for axis, text in zip(panels, r.texts, strict=False):
            points = r.scores.loc[text, columns].dropna(subset=[x]).astype(float).sort_values(columns)
            for index, (router, style) in enumerate(zip(r.routers.index, _styles(r), strict=True)):
                if router in points.index:
                    _band(axis, points.loc[[router]], shade, label=router, zorder=3 - index / entries, **style)
            if stock is not None:
                axis.axvline(stock, color="#888888", linewidth=1, linestyle="-.", label="stock dense model")
            _limit(axis, points, shade)
            axis.set_title(text, fontsize=10, parse_math=False)
            axis.set(xlabel=label, ylabel="cross-entropy (nats per token)")
            axis.xaxis.set_major_locator(MaxNLocator(integer=x == "executed_mean"))
            axis.grid(alpha=0.3)
        for axis in panels[len(r.texts) :]:
            axis.remove()
        lines, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(lines, labels, ncols=ncols, fontsize=fontsize, frameon=False, **place)


def draw_run(folder: Path, scores: Sequence[Scores]) -> None:
    """A run's loss.png, and TensorBoard's curves of its results with executed layers as steps.

    Args:
        folder: of the run.
        scores: on the recipe's test windows.

    Raises:
        RunError: the folder cannot be written.
    """
    from matplotlib.ticker import MaxNLocator

    ordered = sorted(scores, key=lambda each: each.layers)
    points = [(each.executed.mean, *map(math.log, (each.perplexity, *each.interval()))) for each in ordered]
    with figure_at(folder / FIGURE, figsize=(7, 4.5)) as axis:
        _band(axis, pd.DataFrame(points), 0.15, marker="o")
        axis.set(xlabel="executed layers", ylabel="cross-entropy on held-out text (nats per token)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    curves = {
        "test/perplexity_by_layers": [(each.layers, each.perplexity) for each in ordered],
        "test/loss_by_layers": [(each.layers, each.mean_loss) for each in ordered],
        "test/kl_by_layers": [(each.layers, each.mean_kl) for each in ordered],
    }
    with tensorboard_writer(folder) as writer:
        _add_curves(writer, curves)


def write_tensorboard(r: Results, folder: Path, pictures: Mapping[str, Path]) -> None:
    """Write `<folder>/tensorboard` anew: a run for each router, whose curves overlay, and a row for each in HPARAMS.

    Curves have executed layers as steps and means over seeds as values.

    Args:
        r: the results.
        folder: of the comparison.
        pictures: PNG files by name.
    """
    from matplotlib.image import imread
    from torch.utils.tensorboard.summary import hparams

    final, partial = folder / TENSORBOARD, folder / f".{TENSORBOARD}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    columns = {(text, budget): f"{TABLE}/{text}_loss_at_{budget:g}" for text in r.texts for budget in r.budgets}
    fits = r.fits.groupby("router")[["seconds", "parameters"]].mean().add_prefix(f"{TABLE}/fit_")
    names = dict.fromkeys([*fits.columns, *columns.values()], 0.0)  # every router has all columns of the table
    for router, about in r.routers.iterrows():
        scores = r.scores.xs(router, level="router")
        row = {name: [(0, float(value))] for name, value in fits.loc[router].items()}
        row |= {columns[key]: [(0, float(loss))] for key, loss in scores.loss.items()}
        with tensorboard_writer(partial / about.folder) as writer:
            _add_curves(writer, _curves(r, scores) | row)
            # `add_hparams` would write the same into another run, below this one.
            for summary in hparams(_settings(r, router), names):
                writer.file_writer.add_summary(summary)
    with tensorboard_writer(partial / PICTURES) as writer:
        for tag, path in pictures.items():
            writer.add_image(tag, imread(path)[..., :3], dataformats="HWC")
    with writing(final):
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def _add_curves(writer: Any, curves: Mapping[str, Iterable[tuple[int, float]]]) -> None:
    """Points (step, value) by tag."""
    for tag, points in curves.items():
        for step, value in points:
            writer.add_scalar(tag, value, step)


def _curves(r: Results, scores: pd.DataFrame) -> dict[str, list[tuple[int, float]]]:
    """Points (K, value) by tag, of one router's scores by (text, budget)."""
    curves = {f"{text}/{name}": scores.loc[text, name] for text in r.texts for name in ("perplexity", "loss", "kl")}
    curves |= {f"speed/{name}": scores.loc[r.texts[0], name].dropna() for name in ("decode_ms", "prefill_ms")}
    return {
        tag: [(r.budgets[budget], float(value)) for budget, value in values.sort_index().items()]
        for tag, values in curves.items()
        if len(values)
    }


def _settings(r: Results, router: str) -> dict[str, Any]:
    """The same columns for all routers."""
    about, recipe = r.routers.loc[router], r.record["recipe"]
    shared = ("backbone.name", "data.window", "data.prompt", "data.calibration_windows", "trainer.max_steps")
    options = ", ".join(f"{key}={shown(value)}" for key, value in about.options.items())
    own = {"router": about["name"], "options": options, "kind": about.kind, "seeds": len(r.fits.loc[router])}
    return own | {key: recipe[key] for key in shared}


def _band(axis: Any, points: pd.DataFrame, shade: float, **style: Any) -> None:
    """A line through points (x, y, low, high), the area between low and high shaded."""
    x, y, low, high = points.to_numpy().T
    (line,) = axis.plot(x, y, **style)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=shade, linewidth=0)


def _limit(axis: Any, points: pd.DataFrame, shade: float) -> None:
    """Limit the panel to the range of most routers: a line that is far worse leaves it at the top."""
    by_router = points.groupby("router").loss
    worst, least = by_router.max()[by_router.size() > 1], points.loss.min()
    if len(worst) and worst.max() - least > 2.5 * (worst.median() - least):
        span = 1.5 * (worst.median() - least)
        lowest = points.loss_low.min() if shade else least
        axis.set_ylim(bottom=lowest - 0.05 * span, top=least + span)


def _styles(r: Results) -> Iterator[dict[str, Any]]:
    """For each router, in order: its kind decides the stroke."""
    for kind, colour, mark in zip(r.routers.kind, cycle(COLOURS), cycle(MARKS), strict=False):
        width = 2.0 if kind == "learned" else 1.3
        yield {
            "color": colour,
            "marker": mark,
            "linestyle": STROKES.get(kind, "-"),
            "linewidth": width,
            "markersize": 5,
        }
