"""Figures of plans: shares of tokens by layer, and token by token, as PNG files and in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from buddy.evaluation.figures import figure_at
from buddy.inspection.routing import Inspection, changed_layers, pooled_share
from buddy.io import writing

SUFFIX = ".inspect"  # ends the names of the event files written here, so that a later call can replace them
LABELLED, WHOLE = 60, 1024  # tokens of a text that are drawn with labels, and without
NUMBERED_LAYERS = 48  # deeper models get no numbers in the cells of a heat map
SKIPPED, CHOSEN, ALWAYS, SINK = range(4)
KINDS = {
    CHOSEN: ("#0072b2", "ran, chosen"),
    ALWAYS: ("#a0a0a0", "always runs"),
    SINK: ("#e69f00", "ran, sink token"),
    SKIPPED: ("#f4f4f4", "skipped"),
}


def draw_shares(path: Path, columns: Mapping[str, Sequence[float]], *, title: str, label: str) -> None:
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
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in columns]
    size = (2.6 + 0.75 * count, min(11.0, 1.6 + 0.2 * layers))
    with figure_at(path, figsize=(max(size[0], 0.085 * max(map(len, title.splitlines()))), size[1])) as axes:
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
        for layer, column in np.ndindex(shares.shape) if layers <= NUMBERED_LAYERS else ():
            share = shares[layer, column]
            ink = "white" if share > 0.7 else "black"
            axes.text(column, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set_xticks(range(count), [""] * count)
        long = max(len(line) for name in names for line in name.split("\n")) > 9
        axes.set_xticklabels(names, parse_math=False, **({"rotation": 30, "ha": "right"} if long else {}))
        _layer_axis(axes, layers)
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.figure.colorbar(image, ax=axes, label="share of tokens", aspect=40, format=PercentFormatter(1))


def draw_tokens(
    path: Path, runs: np.ndarray, labels: Sequence[str], *, sinks: int, always: tuple[int, int], title: str
) -> None:
    """The plans of one text: tokens to the right, layers upwards, filled where the layer ran.

    The first tokens have their text below them, and above them bars of how many layers changed since the previous
    token. The whole of a longer text is drawn below.

    Args:
        path: of the PNG file.
        runs: (T, L) bool.
        labels: a short text for each token.
        sinks: first tokens at full depth at every budget.
        always: how many layers always run at the bottom and at the top.
        title: above the figure.
    """
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    kinds = _kinds(runs[:WHOLE], sinks, always)
    tokens, layers = min(len(runs), LABELLED), runs.shape[1]
    heights = [0.5, 0.13 * layers, 0.07 * layers][: 3 if len(runs) > tokens else 2]
    size = (max(7.0, 1.2 + 0.2 * tokens), min(16.0, 2.0 + sum(heights)))
    with figure_at(path, figsize=size, nrows=len(heights), height_ratios=heights) as axes:
        changed, labelled, *rest = axes
        changed.bar(range(tokens), changed_layers(runs[:tokens], sinks), color="#444444", width=0.6)
        changed.set(xlim=(-0.5, tokens - 0.5), xticks=[])
        changed.set_ylabel("layers\nchanged", rotation=0, ha="right", va="center")
        changed.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True, min_n_ticks=1))
        changed.spines[["top", "right"]].set_visible(False)
        changed.set_title(title, fontsize=10, parse_math=False)
        _draw_kinds(labelled, kinds[:tokens], lines=True)
        labelled.set_xticks(range(tokens), [""] * tokens)
        labelled.set_xticklabels(map(_in_font, labels[:tokens]), parse_math=False, rotation=90, fontsize=8)
        for ax in rest:
            _draw_kinds(ax, kinds, lines=False)
            ax.set_xlabel(
                f"all {len(runs)} tokens" if len(runs) <= WHOLE else f"the first {WHOLE} of {len(runs)} tokens"
            )
        patches = [Patch(facecolor=colour, edgecolor="#888888", label=name) for colour, name in KINDS.values()]
        legend = {"loc": "outside lower center", "ncols": len(patches), "frameon": False}
        axes[-1].figure.legend(handles=patches, **legend)


def _kinds(runs: np.ndarray, sinks: int, always: tuple[int, int]) -> np.ndarray:
    """(T, L) one of the four kinds for each token and layer."""
    kinds = np.where(runs, CHOSEN, SKIPPED)
    first, last = always
    kinds[:, :first] = kinds[:, runs.shape[1] - last :] = ALWAYS
    kinds[:sinks] = SINK
    return kinds


def _draw_kinds(axes: Any, kinds: np.ndarray, *, lines: bool) -> None:
    from matplotlib.colors import ListedColormap

    tokens, layers = kinds.shape
    colours = ListedColormap([KINDS[kind][0] for kind in sorted(KINDS)])
    corners = np.arange(tokens + 1) - 0.5, np.arange(layers + 1) - 0.5
    edges = {"edgecolors": "white", "linewidth": 0.6} if lines else {"rasterized": True}
    axes.pcolormesh(*corners, kinds.T, cmap=colours, vmin=-0.5, vmax=3.5, **edges)
    _layer_axis(axes, layers)


def _layer_axis(axes: Any, layers: int) -> None:
    """Numbers at every layer, every fifth or every tenth, and at the last, with room between them."""
    step = 1 if layers <= 15 else 5 if layers <= 60 else 10
    last = layers - 1
    axes.set_yticks([*range(0, last - step // 2, step), last])
    axes.set_ylabel("layer")


def _in_font(label: str) -> str:
    """The label with an empty box for every character that the figure's font lacks."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    known = font.get_charmap()
    return "".join(character if ord(character) in known else "□" for character in label)


def draw_all(inspection: Inspection, folder: Path) -> dict[tuple[str, int], Path]:
    """Draw every figure into a folder that exists.

    Returns:
        File by kind and step: ("budgets", 0) with a column for each budget, ("domains", K) with one for each text
        where there are several, ("tokens", K) with the first text token by token. The last two leave out full depth,
        where all layers run, unless there is no other budget.
    """
    router, first = inspection.router, inspection.texts[0]
    shares = {f"{name}\n({count})": pooled_share(inspection.at(count)) for name, count in inspection.executed.items()}
    labels = ", ".join(text.label for text in inspection.texts)
    drawn = {("budgets", 0): folder / "budgets.png"}
    draw_shares(
        drawn["budgets", 0],
        shares,  # type: ignore[arg-type]  # arrays
        title=f"{router}: tokens that ran each layer\n{labels}",
        label="budget (executed layers)",
    )
    below = {name: count for name, count in inspection.executed.items() if count < inspection.geometry.layers}
    for budget, count in (below or inspection.executed).items():
        if len(inspection.texts) > 1:
            drawn["domains", count] = folder / f"domains-{budget}.png"
            draw_shares(
                drawn["domains", count],
                {label: found.share for label, found in inspection.measures[count].items()},
                title=f"{router}: tokens that ran each layer\n{_describe(inspection, budget)}",
                label="text",
            )
        drawn["tokens", count] = folder / f"tokens-{budget}.png"
        draw_tokens(
            drawn["tokens", count],
            inspection.routings[first.label, count].runs[0],
            inspection.words,
            sinks=inspection.sinks,
            always=inspection.always,
            title=f"{router} on {first.label}: layers that each token ran, {_describe(inspection, budget)}",
        )
    return drawn


def write_tensorboard(inspection: Inspection, drawn: Mapping[tuple[str, int], Path], folder: Path) -> None:
    """Figures as images and measures as curves by K; the event files of an earlier call are removed."""
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    with writing(folder):
        older = list(folder.glob(f"events.out.tfevents.*{SUFFIX}"))
        with SummaryWriter(str(folder), filename_suffix=SUFFIX) as writer:
            for (kind, step), path in sorted(drawn.items()):
                writer.add_image(f"routing/{kind}", imread(path)[..., :3], step, dataformats="HWC")
            for count in sorted(set(inspection.executed.values())):
                for label, found in inspection.measures[count].items():
                    curves = {
                        "plan_changes": found.changes,
                        "layers_apart": found.apart,
                        "distinct_plans": found.distinct,
                        "commonest_plan": found.commonest,
                        "off_commonest": found.off_commonest,
                    }
                    for name, value in curves.items():
                        if value is not None:
                            writer.add_scalar(f"routing/{name}/{label}", value, count)
        for path in older:
            path.unlink(missing_ok=True)


def _describe(inspection: Inspection, budget: str) -> str:
    return f"budget {budget} ({inspection.executed[budget]} of {inspection.geometry.layers} layers)"
