"""`python -m studies.predictor_study`: what choosing a budget for each request saves, on texts that differ.

Windows of all texts are measured at every budget. Predictors are fitted on some documents and choose for others. All
methods are swept over their one setting, and compared with fixed budgets and mixtures of two of them at the same mean
loss. "hindsight" chooses from the true losses: the most that there is to win.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from buddy.builders.model import load_model
from buddy.console import print_titled_table, status, stdout, tracker
from buddy.data.text import named_sources
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, DataError
from buddy.evaluation.figures import figure_at
from buddy.inspection.routing import TextWindows, read_text
from buddy.io import check_output_path, write_json, writing
from buddy.predictor.features import measure_targets, sorted_arms
from buddy.router import available_budgets
from buddy.run import Run, read_run
from studies.predictor_choices import FOLDS, Measured, choices, compared, hull

FIGURE, NUMBERS, LOSSES = "predictor.png", "predictor.json", "losses"
OWN = "the run's own"


def study(run_folder: Path, domains: str, *, windows: int, out: Path, budgets: Sequence[str] | None = None) -> None:
    """Measure, choose by every method, print a table, and write a figure and JSON to `out`.

    Args:
        run_folder: a finished run; nothing is written there.
        domains: texts as "SOURCE,label=SOURCE,…".
        windows: of each text at most so many.
        out: a folder, made where it is missing. Losses are stored there, so that the same call resumes.
        budgets: to choose from, instead of the recipe's; full depth is always added.

    Raises:
        BuddyError: the run, a text, a budget or the folder cannot be used.
    """
    run = read_run(run_folder)
    check_output_path(out.absolute() / FIGURE) if out.exists() else check_output_path(out)
    sources = named_sources(domains, run.recipe.data.source)
    with status(f"Loading {run.backbone} …"):
        routed = load_model(run)
    asked = available_budgets(routed.router, run.recipe.budgets) if budgets is None else budgets
    arms = sorted_arms([routed.geometry.layers, *(routed.executed_layers(budget) for budget in asked)])
    with status("Reading texts …"):
        texts = [read_text(run, routed, label, source, windows) for label, source in sources.items()]
    with writing(out):
        out.mkdir(exist_ok=True)
    measured = _measured(run, routed, texts, arms, out)
    if len(set(measured.documents)) < FOLDS:
        raise DataError(f"The texts have fewer than {FOLDS} documents, too few to fit on some and choose for others.")
    chosen = choices(measured, tracker("Training policies"))
    if routed.chooser is not None:
        chosen[OWN] = [_own(routed, texts, measured, run.recipe.data.prompt)]
    report = compared(measured, chosen)
    _show(report, run.router_name)
    shown = _typical(measured, chosen["regress"])
    title = f"what regress chose, at {measured.arms[shown].mean():.1f} layers on average"
    draw(report, measured.arms, measured.domains, shown, title, out / FIGURE)
    write_json(out / NUMBERS, report)
    stdout.print(f"Figure: {out / FIGURE}\nJSON: {out / NUMBERS}")


def _own(routed: RoutedLM, texts: Sequence[TextWindows], measured: Measured, prompt: int) -> np.ndarray:
    """(N,) indices that the run's own predictor chooses; for other budgets than the arms, the next larger arm."""
    choose, chosen = routed.choosing("auto"), []
    for text in texts:
        for ids in text.windows.input_ids.split(8):
            chosen += choose(routed.context(ids[:, :prompt].to(routed.backbone.device))).tolist()
    return np.array([np.flatnonzero(measured.arms >= count)[-1] for count in chosen])


def _measured(run: Run, routed: RoutedLM, texts: Sequence[TextWindows], arms: tuple[int, ...], out: Path) -> Measured:
    size, prompt, found = run.recipe.data.batch_size, run.recipe.data.prompt, []
    for text in texts:
        ids = text.windows.input_ids
        batches = [lambda part=part: part for part in ids.split(size)]
        track = tracker(f"Losses on {text.label}")
        key = text.windows.fingerprint, size
        found.append(measure_targets(routed, batches, arms, prompt=prompt, store=out / LOSSES, key=key, track=track))
    return Measured(
        np.array(arms),
        torch.cat([each.at(arms) for each in found]).numpy(),
        torch.cat([each.features for each in found]),
        routed.geometry.features,
        [text.label for text in texts for _ in range(len(text.windows))],
        [(text.label, int(document)) for text in texts for document in text.windows.documents],
    )


def _typical(measured: Measured, chosen: list[np.ndarray]) -> np.ndarray:
    """(N,) the indices whose mean is nearest to the middle between all layers and the fewest."""
    middle = (measured.arms[0] + measured.arms[-1]) / 2
    return min(chosen, key=lambda places: abs(measured.arms[places].mean() - middle))


def _show(report: dict[str, Any], router: str) -> None:
    """One row for each fixed budget: what each method needs for the same loss."""
    ways = list(report["fixed"][0]["ways"])
    title = f"{router}: layers per token at the mean loss of a fixed budget (saved; 95 % interval)"
    rows = [
        (f"{row['layers']:g}", f"{row['loss']:.3f}", *(_cell(row["ways"][way]) for way in ways))
        for row in report["fixed"]
    ]
    print_titled_table(title, ["fixed", "nats per token", *ways], rows)
    for name, found in report["single"].items():
        text = (
            "no mixture reaches its loss" if found is None else f"{_cell(found)} at {found['loss']:.3f} nats per token"
        )
        stdout.print(f"{name}: {text}")
    stdout.print(f"{report['windows']} windows. regress, priced and grpo were fitted on other documents.")


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    low, high = found["interval"]
    return f"{found['layers']:.2f} ({found['saved']:+.2f}; {low:+.2f}, {high:+.2f})"


def main(
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="A run folder.")],
    domains: Annotated[str, typer.Option(metavar="SOURCE,…", help="Texts; label=SOURCE gives one a name.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for figure, JSON and what was measured.")],
    windows: Annotated[int, typer.Option(min=1, metavar="N", help="Windows of each text at most.")] = 32,
    budgets: Annotated[
        str | None, typer.Option(metavar="B,B…", help="To choose from, instead of the recipe's: 0.75 or 22layers.")
    ] = None,
) -> None:
    """Show what choosing a budget for each request saves, on texts that differ."""
    try:
        study(run, domains, windows=windows, out=out, budgets=None if budgets is None else budgets.split(","))
    except BuddyError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


STYLES = {"hindsight": ":", "grpo": "s--"}


def draw(
    report: Mapping[str, Any], arms: np.ndarray, domains: Sequence[str], chosen: np.ndarray, title: str, path: Path
) -> None:
    """Left: mean loss above a mixture with as many layers, by method. Right: shares of budgets by text.

    Args:
        report: of `compared`.
        arms: (A,) executed layers, deepest first.
        domains: (N,) text of each window.
        chosen: (N,) indices of the arms that are shown on the right.
        title: of the right half.
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
            axes.axhline(0, color="black", linewidth=1, label="mixture of fixed budgets")
            axes.plot(layers, above, "o", color="black", label="fixed budgets")
        else:
            axes.plot(layers, above, STYLES.get(name, "-" if len(layers) > 1 else "*"), label=name)
    axes.set(xlabel="mean executed layers", ylabel="mean loss above the mixture's (nats per token)")
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


if __name__ == "__main__":
    typer.run(main)
