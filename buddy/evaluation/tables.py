"""The tables of results: printed here, written as Markdown by `buddy.evaluation.report`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import pandas as pd

from buddy import console
from buddy.evaluation.results import Results
from buddy.metrics.perplexity import Scores
from buddy.metrics.statistics import flips as flipped
from buddy.metrics.statistics import mixed

NONE = "–"
MARKED = "* below the best static router (†): the 95 % interval of the paired difference excludes 0"


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column labels the rows."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    @property
    def has_numbers(self) -> bool:
        """Whether any cell holds a number."""
        return any(cell not in (NONE, "†") for cells in self.rows for cell in cells[1:])


def show(results: Results) -> None:
    """Print all tables."""
    console.results.print(f"Backbone: {results.backbone}, {results.layers} layers", soft_wrap=True)
    for table in all_tables(results):
        console.print_titled_table(table.title, table.head, table.rows, table.note)


def show_scores(scores: Sequence[Scores], title: str) -> None:
    """Print the results of one router on one text, a row for each budget."""
    head = ["budget", "layers", "executed min / mean / max", "perplexity", "95 % interval", "KL to dense"]
    rows = []
    for each in scores:
        (least, average, most), (low, high) = each.executed, each.interval()
        budget = [f"{each.budget:g}", f"{each.layers}"] if each.chosen is None else [f"{each.budget}", f"{average:.1f}"]
        executed, interval = f"{least} / {average:.2f} / {most}", f"{low:.2f} – {high:.2f}"
        rows.append([*budget, executed, f"{each.perplexity:.2f}", interval, f"{max(each.mean_kl, 0.0):.4f}"])
    note = f"{int(scores[0].tokens.sum())} scored tokens in {len(scores[0].tokens)} documents"
    if scores[0].sinks:
        note += f"; sink tokens, run at full depth and counted apart: {scores[0].sinks} a window"
    console.print_titled_table(title, head, rows, f"{note}.")
    for each in scores:
        if each.chosen is not None:
            console.results.print(_chosen(each, scores), soft_wrap=True)


def show_tasks(entries: Sequence[Mapping[str, Any]], title: str, sinks: int) -> None:
    """Print the scores of one router on tasks, a row for each task and a column for each budget.

    Args:
        entries: as `buddy.evaluation.tasks.task_scores` gives them.
        title: over the table.
        sinks: tokens of each sequence at full depth whatever the budget.
    """
    budgets = {entry["budget"]: entry["layers"] for entry in entries}
    tasks = {entry["task"]: entry for entry in entries}
    by_key = {(entry["task"], entry["budget"]): entry for entry in entries}
    rows = [
        [name, about["metric"], str(about["items"]), *(_score(by_key[name, budget]) for budget in budgets)]
        for name, about in tasks.items()
    ]
    shares = [name for name, about in tasks.items() if about["correct"] is not None]
    if len(shares) > 1:
        means = (mean(by_key[name, budget]["value"] for name in shares) for budget in budgets)
        rows.append(["average", "", "", *(f"{100 * value:.1f}" for value in means)])
    known = [name for name in shares if all((name, budget) in by_key for budget in (1.0, *budgets))]
    if known and len(budgets) > 1:
        turned = (
            mean(mean(flipped(*(by_key[name, each]["correct"] for each in (1.0, budget))).tolist()) for name in known)
            for budget in budgets
        )
        cells = (f"{100 * share:.1f}" if budget != 1.0 else NONE for budget, share in zip(budgets, turned, strict=True))
        rows.append(["flips", "against full depth", "", *cells])
    rows.append(["layers run", "min / mean / max", "", *(_ran(entries, budget) for budget in budgets)])
    head = ["task", "metric", "items", *(f"{budget:g} ({layers})" for budget, layers in budgets.items())]
    note = f"Sink tokens, run at full depth and counted apart: {sinks} a sequence." if sinks else ""
    console.print_titled_table(f"{title}: % right ± standard error, by budget (executed layers)", head, rows, note)


def all_tables(r: Results) -> list[Table]:
    """Every table of the terminal, in the order of reading."""
    found = [make(r, text) for text in r.texts for make in (perplexities, differences)]
    found += [kl(r), costs(r), *speeds(r), *tasks(r), *flips(r)]
    return [table for table in found if table.rows]


def perplexities(r: Results, text: str) -> Table:
    """Routers × budgets: the mean over seeds and its standard deviation."""

    def cell(row: pd.Series) -> str:
        spread = f" ±{number(row.perplexity_std)}" if row.seeds > 1 and row.layers < r.layers else ""
        mark = "†" if row.best_static else "*" if row.apart and row.difference_high < 0 else ""
        return f"{number(row.perplexity)}{spread}{mark}"

    note = f"{MARKED}{'; ± standard deviation over seeds' if _several_seeds(r).any() else ''}."
    return _by_budget(r, f"Perplexity on {text}", r.scores.loc[text], cell, r.budgets, note)


def differences(r: Results, text: str) -> Table:
    """Routers × budgets below full depth: mean cross-entropy minus that of the best static router."""
    best = r.scores.loc[text].query("best_static").reset_index()
    best = best.assign(budget=best.budget.map("{:g}".format)).sort_values("layers", ascending=False)
    where = best.groupby("router", sort=False).budget.agg(", ".join)
    names = "; ".join(f"{router} at {budgets}" for router, budgets in where.items())
    title = f"Difference to the best static router on {text}, nats a token"
    note = f"95 % intervals, paired over documents and seeds; * excludes 0. † best static router: {names}."
    table = _by_budget(r, title, r.scores.loc[text], lambda row: _signed(row, "best_static"), r.below, note)
    return table if table.has_numbers else replace(table, rows=[])


def kl(r: Results, text: str | None = None) -> Table:
    """Routers × budgets below full depth: KL to the dense model on one text, or the mean over all."""
    scores = r.scores if text is None else r.scores.loc[[text]]
    names = scores.index.unique("text")
    means = scores.groupby(["router", "budget"])[["kl"]].mean()
    where = f" on {names[0]}" if len(names) == 1 else ", mean of all texts"
    title = f"KL to the dense model{where}, nats a token"
    return _by_budget(r, title, means, lambda row: f"{max(row.kl, 0.0):.3f}", r.below)


def costs(r: Results) -> Table:
    """Kind, seeds, fitting time and parameters of each router."""
    fits = r.fits.groupby("router", sort=False)
    healed = "adapter_lr" in r.fits
    columns = {
        "router": r.routers.index,
        "kind": r.routers.kind,
        "seeds": fits.size().astype(str),
        "fit (s)": fits.seconds.mean().map("{:.1f}".format),
        "parameters": fits.parameters.mean().map(lambda value: f"{value:,.0f}".replace(",", " ")),
    }
    if healed:
        rates = fits.adapter_lr.agg(lambda each: " ".join(f"{rate:g}" for rate in each.dropna()))
        columns["adapter lr"] = rates.replace("", NONE)
    columns["executed layers"] = pd.Series({router: _executed(r, router) for router in r.routers.index})
    cells = pd.DataFrame(columns, index=r.routers.index)
    note = (
        "Fit: seconds of calibration and training of one run, mean over seeds. Values that an earlier router or run "
        "has measured on the calibration windows are read from the cache. Executed layers: min/mean/max over tokens "
        "where they differ from K."
    )
    return _table("Cost", cells, note + (" Adapter lr: for each seed, the best on validation windows." * healed))


def speeds(r: Results) -> list[Table]:
    """Tokens a second in decoding and in reading a prompt; nothing where they were not measured."""
    found, speed = [], r.record["speed"]
    kinds = [] if not speed else [("decode_ms", "Decode", 1), ("prefill_ms", "Prefill", speed["tokens"])]
    for key, title, tokens in kinds:

        def cell(row: pd.Series, key: str = key, tokens: int = tokens) -> str:
            return NONE if pd.isna(row[key]) else number(1e3 * tokens / row[key])

        what = f"after a prompt of {speed['prompt']} tokens" if tokens == 1 else f"{tokens} tokens"
        threads = f"{speed['threads']} thread{'s' if speed['threads'] > 1 else ''}"
        note = (
            f"Stock dense model: {number(1e3 * tokens / speed['dense'][key])}. One text at a time, {what}; medians "
            f"of {speed['rounds']} rounds, {threads}, one run of each router; full depth is one measurement for all."
        )
        found.append(_by_budget(r, f"{title}, tokens a second", r.scores.loc[r.texts[0]], cell, r.budgets, note))
    return found


def seeds(r: Results, text: str) -> Table:
    """Routers with several seeds × budgets below full depth: smallest and largest perplexity."""
    many = r.scores.loc[text][lambda scores: _several_seeds(r).loc[scores.index.get_level_values("router")].to_numpy()]

    def cell(row: pd.Series) -> str:
        return f"{number(row.perplexity_min)} – {number(row.perplexity_max)}"

    table = _by_budget(r, f"Perplexity on {text}, min – max over seeds", many, cell, r.below)
    chosen = zip(table.rows, _several_seeds(r), strict=True)
    return replace(table, rows=[cells for cells, several in chosen if several])


def tasks(r: Results) -> list[Table]:
    """Routers × tasks at each budget, the mean over tasks, and its difference to the best static router; percent."""
    return [_tasks_at(r, budget) for budget in r.budgets if r.tasks]


def flips(r: Results) -> list[Table]:
    """Routers × budgets: answers that turn right or wrong against full depth, and the difference; percent.

    Nothing where answers are not known item by item.
    """
    if not r.tasks:
        return []

    def share(row: pd.Series) -> str:
        return NONE if pd.isna(row.flips) else f"{100 * row.flips:.1f}{'†' if row.fewest_flips else ''}"

    def flips_difference(row: pd.Series) -> str:
        own = row[[name for name in row.index if "flips_" in f"{name}_"]]
        return _signed(own.rename(lambda name: name.removeprefix("flips_")), "fewest_flips", 100, 1)

    note = (
        "Share of answers that change between right and wrong against full depth, in percent: mean over tasks and "
        "seeds (2407.09141). † fewest of a static router."
    )
    title, paired = (
        "Flips, difference to the static router with the fewest, %",
        "95 % intervals, paired over items and seeds",
    )
    found = [
        _by_budget(r, "Flips against full depth, %", r.task_scores, share, r.below, note),
        _by_budget(r, title, r.task_scores, flips_difference, r.below, f"{paired}; * excludes 0."),
    ]
    return [table for table in found if table.has_numbers]


def number(value: float) -> str:
    """A positive number with about four digits: 27.78, 185.0, 31130, 1.2e6."""
    if value >= 99999.5:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:.0f}" if value >= 999.95 else f"{value:.1f}" if value >= 99.995 else f"{value:.2f}"


def _tasks_at(r: Results, budget: float) -> Table:
    scores = r.task_scores.xs(budget, level="budget").reindex(r.routers.index)
    scores = scores[scores[r.tasks].notna().any(axis=1)]
    names = [*r.tasks, "mean"]
    cells = scores[names].map(lambda share: NONE if pd.isna(share) else f"{100 * share:.1f}")
    cells.insert(0, "router", scores.index)
    title = f"Tasks at {budget:g} ({r.budgets[budget]} layers), %"
    if budget not in r.below:
        return _table(title, cells)
    difference = scores.apply(_signed, axis=1, mark="best_static", scale=100, digits=1)
    note = "Difference of the mean: 95 % interval, paired over items and seeds; * excludes 0; † best static router."
    return _table(title, cells.assign(**{"to the best static": difference}), note)


def _chosen(auto: Scores, scores: Sequence[Scores]) -> str:
    """The choices of a budget predictor, and the perplexity of a random mixture of two fixed budgets."""
    counts = ", ".join(f"{layers} layers for {windows}" for layers, windows in sorted(auto.chosen.items()))
    text = f"{auto.budget} chose, of {sum(auto.chosen.values())} windows, {counts}"
    fixed: dict[float, float] = {each.layers: math.log(each.perplexity) for each in scores if each.chosen is None}
    loss = mixed(fixed, auto.executed[1])
    if loss is not None:
        text += f"; a random mixture of fixed budgets with as many layers has perplexity {math.exp(loss):.2f}"
    return f"{text}."


def _score(entry: Mapping[str, Any]) -> str:
    if entry["correct"] is None:  # no share of right answers
        return f"{entry['value']:.4g}"
    error = "" if entry["stderr"] is None else f" ± {100 * entry['stderr']:.1f}"
    return f"{100 * entry['value']:.1f}{error}"


def _ran(entries: Sequence[Mapping[str, Any]], budget: float) -> str:
    """Layers that tokens ran, over all tasks at a budget that have routed tokens; the mean is the tasks' mean."""
    ran = [entry["executed"] for entry in entries if entry["budget"] == budget and entry["executed"]["min"] is not None]
    if not ran:
        return NONE
    least, most = min(each["min"] for each in ran), max(each["max"] for each in ran)
    return f"{least} / {sum(each['mean'] for each in ran) / len(ran):.2f} / {most}"


def _signed(row: pd.Series, mark: str, scale: float = 1.0, digits: int = 2) -> str:
    """A difference with its interval; † for the router that others are compared to."""
    if pd.isna(row.difference):
        return "†" if row[mark] else NONE
    mean, low, high = (f"{scale * row[f'difference{end}']:+.{digits}f}" for end in ("", "_low", "_high"))
    return f"{mean} ({low}, {high}){'*' if row.apart else ' '}"


def _by_budget(
    r: Results,
    title: str,
    scores: pd.DataFrame,
    cell: Callable[[pd.Series], str],
    budgets: Mapping[float, int],
    note: str = "",
) -> Table:
    """A row for each router and a column for each budget, of scores by (router, budget)."""
    texts = {key: cell(row) for key, row in scores.iterrows() if key[1] in budgets}
    cells = {
        f"{budget:g} ({layers})": [texts.get((router, budget), NONE) for router in r.routers.index]
        for budget, layers in budgets.items()
    }
    return _table(title, pd.DataFrame({"router": r.routers.index, **cells}), note)


def _table(title: str, cells: pd.DataFrame, note: str = "") -> Table:
    return Table(title, [str(name) for name in cells.columns], cells.to_numpy().tolist(), note)


def _several_seeds(r: Results) -> pd.Series:
    """Whether a router has several seeds."""
    return r.fits.groupby("router", sort=False).size().reindex(r.routers.index) > 1


def _executed(r: Results, router: str) -> str:
    """Layers that tokens ran over all texts and seeds, at each budget where that was not K for all."""
    found = []
    own = r.runs.xs(router, level="router")[["executed_min", "executed_mean", "executed_max"]]
    for budget, layers in r.budgets.items():
        ran = own[own.index.get_level_values("budget") == budget]
        if (ran != layers).any(axis=None):
            least, mean, most = ran.executed_min.min(), ran.executed_mean.mean(), ran.executed_max.max()
            found.append(f"{layers}: {least:.0f}/{mean:.2f}/{most:.0f}")
    return "; ".join(found) or "as asked"
