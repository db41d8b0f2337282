"""Results as people and programs read them: table, figure, JSON and TensorBoard curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from buddy.config import Recipe, flatten
from buddy.console import results
from buddy.evaluation.curves import write_run
from buddy.evaluation.figure import band, figure_at
from buddy.io import write_json
from buddy.scoring.perplexity import Scores, as_json, paired_difference, with_documents
from buddy.scoring.statistics import mixed

FIGURE = "loss.png"
COMPARISON = "comparison"
FEWEST = 5  # documents for a mark of significance


def show_run(scores: Sequence[Scores], title: str) -> None:
    """Print one router's results."""
    table = Table(title=title)
    for heading in ("budget", "layers", "executed min / mean / max", "perplexity", "95 % interval", "KL to dense"):
        table.add_column(heading, justify="right")
    for each in scores:
        low, high = each.interval()
        least, mean, most = each.executed
        table.add_row(
            f"{each.budget:g}" if each.chosen is None else str(each.budget),
            str(each.layers) if each.chosen is None else f"{mean:.1f}",
            f"{least} / {mean:.2f} / {most}",
            f"{each.perplexity:.2f}",
            f"{low:.2f} – {high:.2f}",
            f"{max(each.mean_kl, 0.0):.4f}",
        )
    results.print(table)
    results.print(_note(scores[0]))
    for each in scores:
        if each.chosen is not None:
            results.print(_chosen(each, scores), soft_wrap=True)


def _chosen(auto: Scores, scores: Sequence[Scores]) -> str:
    """What a budget predictor chose, beside what a coin between two of the fixed budgets would have reached."""
    counts = ", ".join(f"{layers} layers for {windows}" for layers, windows in sorted(auto.chosen.items()))
    text = f"{auto.budget} chose, of {sum(auto.chosen.values())} windows, {counts}"
    fixed: dict[float, float] = {each.layers: math.log(each.perplexity) for each in scores if each.chosen is None}
    loss = mixed(fixed, auto.executed[1])
    if loss is not None:
        text += f"; a coin between fixed budgets that runs as many layers has perplexity {math.exp(loss):.2f}"
    return f"{text}."


def show_comparison(scores: Mapping[str, Sequence[Scores]], folders: Mapping[str, Path], main: str) -> None:
    """Print all routers side by side, with paired differences to `main`; leave a figure and JSON in its run folder.

    Args:
        scores: by router.
        folders: the run folder of each router.
        main: the router whose recipe it is.
    """
    results.print(_perplexities(scores))
    differences = _differences(scores, main)
    if differences:
        results.print(_difference_table(differences, main))
    results.print(_note(scores[main][0]))
    place = folders[main] / COMPARISON
    write_json(place.with_suffix(".json"), {name: as_json(each) for name, each in scores.items()} | differences)
    draw(scores, place.with_suffix(".png"))
    for line in (
        f"Figure:      {place}.png",
        f"Runs:        {', '.join(map(str, folders.values()))}",
        f"TensorBoard: tensorboard --logdir {folders[main].parent.parent}",
    ):
        results.print(line, soft_wrap=True)


def write_results(
    folder: Path,
    recipe: Recipe,
    scores: Sequence[Scores],
    *,
    fit: Mapping[str, float],
    windows: str,
) -> dict[str, Any]:
    """Write the figure and TensorBoard's curves and settings into a run folder; what metrics.json is to hold.

    Args:
        folder: of the run.
        recipe: that it was made by.
        scores: on the recipe's test windows.
        fit: "seconds" that calibration and training took and "parameters" of the router.
        windows: fingerprint of the test windows.
    """
    found: dict[str, Any] = {"fit": dict(fit), "windows": windows}
    draw({recipe.router.name: scores}, folder / FIGURE)
    write_curves(folder, recipe, scores, found["fit"])
    return with_documents(scores) | found


def write_curves(folder: Path, recipe: Recipe, scores: Sequence[Scores], fit: Mapping[str, float]) -> None:
    """TensorBoard scalars with step = executed layers, so that the runs of several routers overlay, and settings."""
    ordered = sorted(scores, key=lambda s: s.layers)
    curves = {
        "test/perplexity": [(s.layers, s.perplexity) for s in ordered],
        "test/loss": [(s.layers, math.log(s.perplexity)) for s in ordered],
        "test/kl": [(s.layers, s.mean_kl) for s in ordered],
    }
    metrics = {f"perplexity_at_{s.budget:g}": s.perplexity for s in ordered}
    metrics |= {f"fit_{name}": value for name, value in fit.items()}
    columns = [f"perplexity_at_{budget:g}" for budget in recipe.budgets]
    text = "\n".join(f"    {key}: {value}" for key, value in flatten(recipe).items())
    write_run(folder, curves, settings_of(recipe), metrics, {"recipe": text}, columns)


def settings_of(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """A recipe for TensorBoard's table of hyper-parameters: the same columns for every router."""
    flat = flatten(recipe)
    options = {key: flat.pop(key) for key in [*flat] if key.startswith("router.options.")}
    return flat | {"router.options": ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in options.items())}


def draw(scores: Mapping[str, Sequence[Scores]], path: Path) -> None:
    """Loss over executed layers, one line a router, with 95 % intervals as bands."""
    from matplotlib.ticker import MaxNLocator

    with figure_at(path, figsize=(7, 4.5)) as axes:
        for name, each in scores.items():
            ordered = sorted(each, key=lambda s: s.layers)
            points = [(s.layers, *map(math.log, (s.perplexity, *s.interval()))) for s in ordered]
            band(axes, points, label=name)  # type: ignore[arg-type]  # four numbers each
        axes.set_xlabel("executed layers")
        axes.set_ylabel("cross-entropy on held-out text (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()


def _by_budget(scores: Sequence[Scores]) -> dict[float | str, Scores]:
    return {each.budget: each for each in scores}


def _budgets(scores: Mapping[str, Sequence[Scores]]) -> dict[float, int]:
    """Every budget and its layers, deepest first."""
    found: dict[Any, int] = {each.budget: each.layers for group in scores.values() for each in group}
    return dict(sorted(found.items(), reverse=True))


def _perplexities(scores: Mapping[str, Sequence[Scores]]) -> Table:
    budgets = _budgets(scores)
    table = Table(title="Perplexity on held-out text, by budget (executed layers)")
    table.add_column("router")
    for budget, layers in budgets.items():
        table.add_column(f"{budget:g} ({layers})", justify="right")
    for name, group in scores.items():
        held = _by_budget(group)
        table.add_row(name, *(f"{held[budget].perplexity:.2f}" if budget in held else "–" for budget in budgets))
    return table


def _differences(scores: Mapping[str, Sequence[Scores]], main: str) -> dict[str, Any]:
    """{"differences": …}: `main` minus each other router, nats a token, with paired bootstrap intervals."""
    ours = _by_budget(scores[main])
    found = []
    for name, group in scores.items():
        for theirs in group if name != main else ():
            if theirs.budget in ours:
                mean, interval = paired_difference(ours[theirs.budget], theirs)
                entry = {"router": name, "budget": theirs.budget, "difference": mean, "interval": list(interval)}
                found.append(entry | {"documents": len(theirs.tokens)})
    return {"differences": found} if found else {}


def _difference_table(differences: Mapping[str, Any], main: str) -> Table:
    entries = {(each["router"], each["budget"]): each for each in differences["differences"]}
    budgets = sorted({budget for _, budget in entries}, reverse=True)
    few = any(each["documents"] < FEWEST for each in differences["differences"])
    marks = f"none is marked below {FEWEST} documents" if few else "* apart from zero"
    table = Table(title=f"{main} minus others, nats a token, paired over documents (95 % interval; {marks})")
    table.add_column("router")
    for budget in budgets:
        table.add_column(f"{budget:g}", justify="right")
    for name in dict.fromkeys(router for router, _ in entries):
        table.add_row(name, *(_cell(entries.get((name, budget))) for budget in budgets))
    return table


def _cell(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    low, high = entry["interval"]
    enough = entry["documents"] >= FEWEST  # a bootstrap over fewer documents says nothing
    mark = "*" if enough and (low > 0 or high < 0) else " "
    return f"{entry['difference']:+.3f} ({low:+.3f}, {high:+.3f}){mark}"


def _note(scores: Scores) -> str:
    text = f"{int(scores.tokens.sum())} scored tokens in {len(scores.tokens)} documents"
    if scores.sinks:
        text += f"; sink tokens, run at full depth and counted apart: {scores.sinks} a window"
    return f"{text}."
