"""Results as people and programs read them: table, figure, JSON and TensorBoard curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from buddy.evaluation.figure import figure_at
from buddy.evaluation.perplexity import Scores, paired_difference
from buddy.files import write_json
from buddy.progress import results
from buddy.recipe import flatten
from buddy.runs import METRICS
from buddy.schema import Recipe

FIGURE = "loss.png"
COMPARISON = "comparison"
FEWEST = 5  # documents for a mark of significance


def as_json(scores: Sequence[Scores]) -> dict[str, Any]:
    """{"results": [one entry a budget]}; losses in nats, `interval` is the perplexity's 95 % bootstrap interval."""
    return {"results": [_entry(each) for each in scores]}


def show_run(scores: Sequence[Scores], title: str) -> None:
    """Print one router's results."""
    table = Table(title=title)
    for heading in ("budget", "layers", "executed min / mean / max", "perplexity", "95 % interval", "KL to dense"):
        table.add_column(heading, justify="right")
    for each in scores:
        low, high = each.interval()
        least, mean, most = each.executed
        table.add_row(
            f"{each.budget:g}",
            str(each.layers),
            f"{least} / {mean:.2f} / {most}",
            f"{each.perplexity:.2f}",
            f"{low:.2f} – {high:.2f}",
            f"{max(each.mean_kl, 0.0):.4f}",
        )
    results.print(table)
    results.print(_note(scores[0]))


def show_comparison(scores: Mapping[str, Sequence[Scores]], folder: Path, main: str) -> None:
    """Print all routers side by side, with paired differences to `main`, and leave a figure and JSON in `folder`."""
    results.print(_perplexities(scores))
    differences = _differences(scores, main)
    if differences:
        results.print(_difference_table(differences, main))
    results.print(_note(scores[main][0]))
    write_json(folder / f"{COMPARISON}.json", {name: as_json(each) for name, each in scores.items()} | differences)
    draw(scores, folder / f"{COMPARISON}.png")
    for line in (
        f"Figure:      {folder / COMPARISON}.png",
        f"Runs:        {', '.join(str(folder / name) for name in scores)}",
        f"TensorBoard: tensorboard --logdir {folder}",
    ):
        results.print(line, soft_wrap=True)


def write_results(folder: Path, recipe: Recipe, scores: Sequence[Scores]) -> None:
    """Into a run folder: metrics.json with the sums per document, the figure, and TensorBoard's curves and settings."""
    documents = [
        {"budget": s.budget, "loss": s.loss.tolist(), "kl": s.kl.tolist(), "tokens": s.tokens.tolist()} for s in scores
    ]
    write_json(folder / METRICS, as_json(scores) | {"documents": documents})
    draw({recipe.router.name: scores}, folder / FIGURE)
    write_curves(folder, recipe, scores)


def write_curves(folder: Path, recipe: Recipe, scores: Sequence[Scores]) -> None:
    """TensorBoard scalars with step = executed layers, so that the runs of several routers overlay."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for each in sorted(scores, key=lambda s: s.layers):
            writer.add_scalar("test/perplexity", each.perplexity, each.layers)
            writer.add_scalar("test/loss", math.log(each.perplexity), each.layers)
            writer.add_scalar("test/kl", each.mean_kl, each.layers)
        writer.add_text("recipe", "\n".join(f"    {key}: {value}" for key, value in flatten(recipe).items()))


def draw(scores: Mapping[str, Sequence[Scores]], path: Path) -> None:
    """Loss over executed layers, one line a router, with 95 % intervals as bands."""
    from matplotlib.ticker import MaxNLocator

    with figure_at(path, figsize=(7, 4.5)) as axes:
        for name, each in scores.items():
            ordered = sorted(each, key=lambda s: s.layers)
            layers = [s.layers for s in ordered]
            (line,) = axes.plot(layers, [math.log(s.perplexity) for s in ordered], marker="o", label=name)
            bounds = [[math.log(bound) for bound in s.interval()] for s in ordered]
            axes.fill_between(layers, *zip(*bounds, strict=True), color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xlabel("executed layers")
        axes.set_ylabel("cross-entropy on held-out text (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()


def _entry(scores: Scores) -> dict[str, Any]:
    least, mean, most = scores.executed
    return {
        "budget": scores.budget,
        "layers": scores.layers,
        "executed": {"min": least, "mean": mean, "max": most},
        "sink_tokens": scores.sinks,
        "perplexity": scores.perplexity,
        "kl": scores.mean_kl,
        "interval": list(scores.interval()),
        "documents": len(scores.tokens),
        "tokens": int(scores.tokens.sum()),
    }


def _by_budget(scores: Sequence[Scores]) -> dict[float, Scores]:
    return {each.budget: each for each in scores}


def _budgets(scores: Mapping[str, Sequence[Scores]]) -> dict[float, int]:
    """Every budget and its layers, deepest first."""
    found = {each.budget: each.layers for group in scores.values() for each in group}
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
    table = Table(title=f"{main} minus others, nats a token, paired over documents (95 % interval; * apart from zero)")
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
