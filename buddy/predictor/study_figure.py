"""The picture of a study: what each way of choosing reaches, and what it chose for which text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from buddy.evaluation.figure import figure_at
from buddy.evaluation.mixture import hull

STYLES = {"hindsight": ":", "grpo": "s--"}


def draw(
    report: Mapping[str, Any], arms: np.ndarray, domains: Sequence[str], chosen: np.ndarray, title: str, path: Path
) -> None:
    """Left: mean loss above that of a coin with as many layers, by way of choosing. Right: shares of budgets by text.

    Args:
        report: of `compared`.
        arms: (A,) executed layers, deepest first.
        domains: (N,) text of each window.
        chosen: (N,) places of the arms that are shown on the right.
        title: what chose them.
        path: a PNG file.
    """
    with figure_at(path, ncols=2, figsize=(12, 4.5), width_ratios=(3, 2)) as (left, right):
        _curves(left, report["points"])
        _shares(right, arms, domains, chosen)
        right.set(title=title, xlabel="share of windows", xlim=(0, 1))


def _curves(axes: Any, points: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    fixed = {point["layers"]: point["loss"] for point in points["fixed"]}
    coin = hull(fixed)
    for name, each in points.items():
        layers, losses = np.array(sorted((point["layers"], point["loss"]) for point in each)).T
        above = losses - np.interp(layers, *coin)
        if name == "fixed":
            axes.axhline(0, color="black", linewidth=1, label="coin between fixed budgets")
            axes.plot(layers, above, "o", color="black", label="fixed budgets")
        else:
            axes.plot(layers, above, STYLES.get(name, "-" if len(layers) > 1 else "*"), label=name)
    axes.set(xlabel="mean executed layers", ylabel="mean loss above the coin's (nats a token)")
    axes.set_title("lower is better")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)


def _shares(axes: Any, arms: np.ndarray, domains: Sequence[str], chosen: np.ndarray) -> None:
    from matplotlib import colormaps

    names, start = list(dict.fromkeys(domains)), np.zeros(len(set(domains)))
    for place in range(len(arms))[::-1]:
        own = [np.array([domain == name for domain in domains]) for name in names]
        share = np.array([(chosen[rows] == place).mean() for rows in own])
        colour = colormaps["viridis"](place / max(1, len(arms) - 1))
        axes.barh(names, share, left=start, color=colour, label=f"{arms[place]} layers")
        start += share
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=min(5, len(arms)), frameon=False)
