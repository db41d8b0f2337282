"""`python -m buddy.predictor.study`: what choosing a budget for each request saves, on texts that differ.

Windows of all texts are measured at every budget. Predictors are fitted on some documents and choose for others, so
nobody is asked about what it was fitted on. All ways of choosing are swept over their one setting, and held against
fixed budgets and coins between two of them at the same mean loss. Best in hindsight shows what there is to win.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table

from buddy.assemble import budgets_of, routed_from
from buddy.console import results, status, tracker
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, DataError
from buddy.inspection.routing import Domain, read_domains, sources_of
from buddy.io import check_place, write_json, writing
from buddy.predictor.choosing import FOLDS, Measured, choices, compared
from buddy.predictor.features import ordered
from buddy.predictor.study_figure import draw
from buddy.predictor.targets import digest_of, measure
from buddy.run import Run, read_run

FIGURE, NUMBERS = "predictor.png", "predictor.json"
OWN = "the run's own"


def study(run_folder: Path, domains: str, *, windows: int, out: Path, budgets: Sequence[str] | None = None) -> None:
    """Measure, choose in every way, print a table, and leave a figure and JSON in `out`.

    Args:
        run_folder: a finished run; nothing is written there.
        domains: texts as "SOURCE,label=SOURCE,…".
        windows: of each text at most so many.
        out: a folder, made where it is missing. Losses are kept there, so that the same call goes on where it was.
        budgets: to choose from, instead of the recipe's; full depth is always among them.

    Raises:
        BuddyError: the run, a text, a budget or the folder cannot be used.
    """
    run = read_run(run_folder)
    check_place(out.absolute() / FIGURE) if out.exists() else check_place(out)
    sources = sources_of(domains, run.recipe.data.source)
    with status(f"Loading {run.backbone} …"):
        routed = routed_from(run)
    asked = budgets_of(run.recipe, routed) if budgets is None else budgets
    arms = ordered([routed.geometry.layers, *(routed.executed_layers(budget) for budget in asked)])
    with status("Reading texts …"):
        texts = read_domains(run, routed, sources, windows)
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
    results.print(f"Figure: {out / FIGURE}\nJSON: {out / NUMBERS}", soft_wrap=True)


def _own(routed: RoutedLM, texts: Sequence[Domain], measured: Measured, prompt: int) -> np.ndarray:
    """(N,) places that the run's own predictor chooses; for budgets that are none of the arms, the next larger arm."""
    choose, chosen = routed.choosing("auto"), []
    for text in texts:
        for ids in text.windows.input_ids.split(8):
            chosen += choose(routed.context(ids[:, :prompt].to(routed.backbone.device))).tolist()
    return np.array([np.flatnonzero(measured.arms >= count)[-1] for count in chosen])


def _measured(run: Run, routed: RoutedLM, texts: Sequence[Domain], arms: tuple[int, ...], out: Path) -> Measured:
    size, prompt, found = run.recipe.data.batch_size, run.recipe.data.prompt, []
    for text in texts:
        ids = text.windows.input_ids
        place = out / f"losses-{digest_of(routed, text.windows.fingerprint, arms, prompt, size)}.safetensors"
        batches = [partial(_itself, part) for part in ids.split(size)]
        words = tracker(f"Losses on {text.label}")
        found.append(measure(routed, batches, arms, prompt=prompt, place=place, track=words))
    return Measured(
        np.array(arms),
        torch.cat([each.at(arms) for each in found]).numpy(),
        torch.cat([each.features for each in found]),
        routed.geometry.features,
        [text.label for text in texts for _ in range(len(text.windows))],
        [(text.label, int(document)) for text in texts for document in text.windows.documents],
    )


def _typical(measured: Measured, chosen: list[np.ndarray]) -> np.ndarray:
    """(N,) the places whose mean is nearest to the middle between all layers and the fewest."""
    middle = (measured.arms[0] + measured.arms[-1]) / 2
    return min(chosen, key=lambda places: abs(measured.arms[places].mean() - middle))


def _itself(ids: torch.Tensor) -> torch.Tensor:
    return ids


def _show(report: dict[str, Any], router: str) -> None:
    """One row for each fixed budget: what each way of choosing needs for the same loss."""
    ways = list(report["fixed"][0]["ways"])
    table = Table(title=f"{router}: layers a token at the mean loss of a fixed budget (saved; 95 % interval)")
    for heading in ("fixed", "nats a token", *ways):
        table.add_column(heading, justify="right")
    for row in report["fixed"]:
        table.add_row(f"{row['layers']:g}", f"{row['loss']:.3f}", *(_cell(row["ways"][way]) for way in ways))
    results.print(table)
    for name, found in report["single"].items():
        told = "no coin reaches its loss" if found is None else f"{_cell(found)} at {found['loss']:.3f} nats a token"
        results.print(f"{name}: {told}")
    results.print(f"{report['windows']} windows. regress, priced and grpo were fitted on other documents.")


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


if __name__ == "__main__":
    typer.run(main)
