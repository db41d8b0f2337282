"""Figures of plans: shares of tokens by layer, and token by token, as PNG files and in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from buddy.evaluation.figures import figure_at
from buddy.inspection.routing import ALWAYS, CHOSEN, SINK, SKIPPED, Inspection
from buddy.io import tensorboard_writer

SUFFIX = ".inspect"  # ends the names of the event files written here, so that a later call can replace them
LABELLED = 60  # tokens of a text that are drawn with their labels
NUMBERED_LAYERS = 48  # deeper models get no numbers in the cells of a heat map
LONGEST = 24  # characters of a column's name
KINDS = {
    CHOSEN: ("#0072b2", "ran, chosen"),
    ALWAYS: ("#a0a0a0", "always runs"),
    SINK: ("#e69f00", "ran, sink token"),
    SKIPPED: ("#f4f4f4", "skipped"),
}
CURVES = {  # attribute of `Measures` → name in TensorBoard
    "changes": "plan_changes",
    "apart": "layers_apart",
    "distinct": "distinct_plans",
    "commonest": "commonest_plan",
    "off_commonest": "off_commonest",
}


def draw_shares(path: Path, columns: Mapping[str, np.ndarray], *, title: str, label: str) -> None:
    """A heat map: layers upwards, a column for each budget or text, the share of tokens that ran the layer as colour.

    Args:
        path: of the PNG file.
        columns: (L,) shares by column name.
        title: above the figure.
        label: what the columns are.
    """
    from matplotlib.ticker import PercentFormatter

    shares = np.array(list(columns.values())).T
    layers, count = shares.shape
    names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in columns]
    width = max(2.6 + 0.75 * count, 0.085 * max(map(len, title.splitlines())))
    with figure_at(path, figsize=(width, min(11.0, 1.6 + 0.2 * layers))) as axes:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for layer, column in np.ndindex(shares.shape) if layers <= NUMBERED_LAYERS else ():
            share = shares[layer, column]
            ink = "white" if share > 0.7 else "black"
            axes.text(column, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set_xticks(range(count), [""] * count)
        axes.set_xticklabels(names, parse_math=False, rotation=30, ha="right")
        axes.set(xlabel=label, ylabel="layer")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.figure.colorbar(image, ax=axes, label="share of tokens", aspect=40, format=PercentFormatter(1))


def draw_tokens(path: Path, inspection: Inspection, budget: str) -> None:
    """The plans of the first window: tokens to the right, layers upwards, filled where the layer ran.

    The first tokens have their text below them, and above them bars of how many layers changed since the previous
    token. The whole of a longer text is drawn below.
    """
    from matplotlib.patches import Patch

    kinds = inspection.kinds(inspection.executed[budget])
    tokens, layers = min(len(kinds), LABELLED), kinds.shape[1]
    heights = [0.5, 0.13 * layers, 0.07 * layers][: 3 if len(kinds) > tokens else 2]
    size = (max(7.0, 1.2 + 0.2 * tokens), min(16.0, 2.0 + sum(heights)))
    with figure_at(path, figsize=size, nrows=len(heights), height_ratios=heights) as axes:
        changed, labelled, *rest = axes
        changes = inspection.changed(inspection.executed[budget])[:tokens]
        changed.bar(range(tokens), changes, color="#444444", width=0.6)
        changed.set(xlim=(-0.5, tokens - 0.5), xticks=[])
        changed.set_ylabel("layers\nchanged", rotation=0, ha="right", va="center")
        changed.yaxis.get_major_locator().set_params(integer=True, nbins=2)
        changed.spines[["top", "right"]].set_visible(False)
        title = f"{inspection.router} on {inspection.texts[0].label}: layers that each token ran"
        changed.set_title(f"{title}, {_heading(inspection, budget)}", fontsize=10, parse_math=False)
        _draw_kinds(labelled, kinds[:tokens], edgecolors="white", linewidth=0.6)
        labelled.set_xticks(range(tokens), [""] * tokens)
        labels = map(_in_font, inspection.words[:tokens])
        labelled.set_xticklabels(labels, parse_math=False, rotation=90, fontsize=8)
        for ax in rest:
            _draw_kinds(ax, kinds, rasterized=True)
            ax.set_xlabel(f"all {len(kinds)} tokens")
        patches = [Patch(facecolor=colour, edgecolor="#888888", label=name) for colour, name in KINDS.values()]
        axes[-1].figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)


def _draw_kinds(axes: Any, kinds: np.ndarray, **style: Any) -> None:
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([KINDS[kind][0] for kind in sorted(KINDS)])
    corners = (np.arange(size + 1) - 0.5 for size in kinds.shape)
    axes.pcolormesh(*corners, kinds.T, cmap=colours, vmin=-0.5, vmax=3.5, **style)
    axes.set_ylabel("layer")
    axes.yaxis.get_major_locator().set_params(integer=True)


def _in_font(label: str) -> str:
    """The label with an empty box for every character that the figure's font lacks."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    return "".join(character if ord(character) in known else "□" for character in label)


def draw_all(inspection: Inspection, folder: Path) -> dict[tuple[str, int], Path]:
    """Draw every figure into a folder that exists.

    Returns:
        File by kind and step: ("budgets", 0) with a column for each budget, ("domains", K) with one for each text
        where there are several, ("tokens", K) with the first text token by token. The last two leave out full depth,
        where all layers run, unless there is no other budget.
    """
    texts, executed = inspection.texts, inspection.executed
    title = f"{inspection.router}: tokens that ran each layer\n"
    drawn = {("budgets", 0): folder / "budgets.png"}
    shares = {f"{budget} ({count})": inspection.plans(count).mean((0, 1)) for budget, count in executed.items()}
    labels = ", ".join(text.label for text in texts)
    draw_shares(drawn["budgets", 0], shares, title=title + labels, label="budget (executed layers)")
    below = {budget: count for budget, count in executed.items() if count < inspection.geometry.layers}
    for budget, count in (below or executed).items():
        if ("tokens", count) in drawn:
            continue  # the same layers under another name
        if len(texts) > 1:
            drawn["domains", count] = folder / f"domains-{budget}.png"
            shares = {label: np.array(found.share) for label, found in inspection.measures[count].items()}
            draw_shares(drawn["domains", count], shares, title=title + _heading(inspection, budget), label="text")
        drawn["tokens", count] = folder / f"tokens-{budget}.png"
        draw_tokens(drawn["tokens", count], inspection, budget)
    return drawn


def _heading(inspection: Inspection, budget: str) -> str:
    return f"budget {budget} ({inspection.executed[budget]} of {inspection.geometry.layers} layers{inspection.mean})"


def write_tensorboard(inspection: Inspection, drawn: Mapping[tuple[str, int], Path], folder: Path) -> None:
    """Figures as images and measures as curves by K; the event files of an earlier call are removed."""
    from matplotlib.image import imread

    with tensorboard_writer(folder, SUFFIX) as writer:
        for (kind, step), path in sorted(drawn.items()):
            writer.add_image(f"routing/{kind}", imread(path)[..., :3], step, dataformats="HWC")
        for count, texts in sorted(inspection.measures.items()):
            for label, found in texts.items():
                for field, name in CURVES.items():
                    if (value := getattr(found, field)) is not None:
                        writer.add_scalar(f"routing/{name}/{label}", value, count)
