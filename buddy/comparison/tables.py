"""The tables of a comparison: for the terminal and for Markdown alike."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Sequence

from buddy.comparison.grid import Grid, number
from buddy.comparison.view import Comparison, Difference

NONE = "–"
MARKED = "* below the best static router (†), the interval of the paired difference leaves out 0"


def all_grids(comparison: Comparison) -> list[Grid]:
    """Every table, in the order of reading."""
    grids = []
    for domain in comparison.domains:
        grids += [perplexities(comparison, domain), differences(comparison, domain)]
    grids += [kl_grid(comparison), costs(comparison), *speeds(comparison), *tasks(comparison)]
    grids += flips(comparison)
    return [grid for grid in grids if grid.rows]


def perplexities(c: Comparison, domain: str) -> Grid:
    """Routers × budgets: the mean over seeds and its standard deviation."""

    def cell(label: str, budget: float) -> str:
        values = c.perplexities(label, domain, budget)
        spread = f" ±{number(plain.stdev(values))}" if len(values) > 1 and budget in c.below else ""
        difference = c.difference(label, domain, budget)
        mark = "*" if difference and difference.apart and difference.high < 0 else ""
        mark = "†" if budget in c.below and label == c.best_static(domain, budget) else mark
        return f"{number(plain.mean(values))}{spread}{mark}"

    many = any(len(c.runs(label)) > 1 for label in c.labels)
    note = f"{MARKED}{'; ± standard deviation over seeds' if many else ''}."
    return _by_budget(c, f"Perplexity on {domain}", c.budgets, cell, note)


def differences(c: Comparison, domain: str) -> Grid:
    """Routers × budgets below full depth: mean cross-entropy minus that of the best static router."""

    def cell(label: str, budget: float) -> str:
        found = c.difference(label, domain, budget)
        if found is None:
            return "†" if label == c.best_static(domain, budget) else NONE
        return _signed(found)

    best = {budget: c.best_static(domain, budget) for budget in c.below}
    title = f"Difference to the best static router on {domain}, nats a token"
    where = {label: [f"{budget:g}" for budget, other in best.items() if other == label] for label in best.values()}
    names = "; ".join(f"{label} at {', '.join(budgets)}" for label, budgets in where.items() if label)
    note = f"95 % intervals, paired over documents and seeds; * leaves out 0. † best static router: {names}."
    grid = _by_budget(c, title, c.below, cell, note)
    shown = [row for row in grid.rows if {*row[1:]} - {NONE, "†"}]
    return Grid(title, grid.head, grid.rows if shown else (), note)


def kl_grid(c: Comparison, domain: str | None = None) -> Grid:
    """Routers × budgets: KL to the dense model on one text, or the mean of all."""
    domains = c.domains if domain is None else [domain]
    where = f" on {domains[0]}" if len(domains) == 1 else ", mean of all texts"

    def cell(label: str, budget: float) -> str:
        return f"{max(plain.mean(c.kl(label, each, budget) for each in domains), 0.0):.3f}"

    return _by_budget(c, f"KL to the dense model{where}, nats a token", c.below, cell)


def costs(c: Comparison) -> Grid:
    """What each router is and what it took."""
    rows = []
    chosen = any(c.rates(label) for label in c.labels)
    for label in c.labels:
        router = c.routers[label]
        ran = [f"{count}: {least}/{mean:.2f}/{most}" for count, least, mean, most in c.executed(label)]
        seconds, parameters = c.fit(label, "seconds"), c.fit(label, "parameters")
        cells = (router["kind"], str(len(c.runs(label))), f"{seconds:.1f}", f"{parameters:,.0f}".replace(",", " "))
        rates = (" ".join(f"{rate:g}" for rate in c.rates(label)) or "–",) if chosen else ()
        rows.append((label, *cells, *rates, "; ".join(ran) or "as asked"))
    healed = ("adapter's rate",) if chosen else ()
    head = ("router", "kind", "seeds", "fit (s)", "parameters", *healed, "layers that ran")
    return Grid(
        "What it takes",
        head,
        tuple(rows),
        "Fit: calibration and training of one run, mean over seeds; what a router before it in the same process, or an "
        "earlier run, has measured on the calibration windows is not measured again. Layers that ran: min/mean/max "
        "over tokens where they were not as asked."
        + (" Adapter's rate: of each seed, the best on validation windows." if chosen else ""),
    )


def speeds(c: Comparison) -> list[Grid]:
    """Tokens a second in decoding and in reading a prompt; nothing where they were not measured."""
    measured = c.record["speed"]
    if not measured:
        return []
    grids = []
    for key, title, tokens in (("decode_ms", "Decode", 1), ("prefill_ms", "Prefill", measured["tokens"])):

        def cell(label: str, budget: float, key: str = key, tokens: int = tokens) -> str:
            found = c.speed(label, c.budgets[budget])
            return number(1e3 * tokens / found[key]) if found else NONE

        what = f"after a prompt of {measured['prompt']} tokens" if tokens == 1 else f"{tokens} tokens"
        threads = f"{measured['threads']} thread{'s' if measured['threads'] > 1 else ''}"
        note = (
            f"Stock dense model: {number(1e3 * tokens / measured['dense'][key])}. One text at a time, {what}; medians "
            f"of {measured['rounds']} rounds, {threads}, one run of each router; full depth is one measurement for all."
        )
        grids.append(_by_budget(c, f"{title}, tokens a second", c.budgets, cell, note))
    return grids


def seeds(c: Comparison, domain: str) -> Grid:
    """Routers with several seeds × budgets below full depth: least and most perplexity."""

    def cell(label: str, budget: float) -> str:
        values = c.perplexities(label, domain, budget)
        return f"{number(min(values))} – {number(max(values))}"

    many = [label for label in c.labels if len(c.runs(label)) > 1]
    return _by_budget(c, f"Perplexity on {domain}, least – most over seeds", c.below, cell, labels=many)


def tasks(c: Comparison) -> list[Grid]:
    """Routers × tasks at each budget, the mean over tasks, and its difference to the best static router; percent."""
    return [_tasks_at(c, budget, layers) for budget, layers in c.budgets.items() if c.task_names]


def flips(c: Comparison) -> list[Grid]:
    """Routers × budgets: the share of answers that turn right or wrong against full depth, and what differs; percent.

    A mean over tasks and seeds, as "flips" in 2407.09141; nothing where answers are not known one by one.
    """

    def share(label: str, budget: float) -> str:
        found = c.flips(label, budget)
        mark = "†" if label == c.fewest_flips(budget) else ""
        return NONE if found is None else f"{100 * found:.1f}{mark}"

    def apart(label: str, budget: float) -> str:
        found = c.flips_difference(label, budget)
        if found is None:
            return "†" if label == c.fewest_flips(budget) else NONE
        return _signed(found, 100, 1)

    note = (
        "Answers that are right at full depth and wrong here, or wrong there and right here, in percent of all: the "
        "mean over tasks and seeds (2407.09141). † fewest of a static router."
    )
    title = "Flips, difference to the static router of fewest, %"
    paired = "95 % intervals, paired over items and seeds; * leaves out 0."
    grids = [_by_budget(c, "Flips against full depth, %", c.below, share, note)]
    grids.append(_by_budget(c, title, c.below, apart, paired))
    return [grid for grid in grids if {cell for row in grid.rows for cell in row[1:]} - {NONE, "†"}]


def _tasks_at(c: Comparison, budget: float, layers: int) -> Grid:
    rows = []
    for label in c.labels:
        values = [c.task_values(label, task, budget) for task in c.task_names]
        mean, found = c.task_mean(label, budget), c.task_difference(label, budget)
        if any(values):
            cells = [f"{100 * plain.mean(each):.1f}" if each else NONE for each in values]
            best = "†" if budget in c.below and label == c.best_static_at_tasks(budget) else NONE
            spread = _signed(found, 100, 1) if found else best
            rows.append((label, *cells, NONE if mean is None else f"{100 * mean:.1f}", spread))
    head = ("router", *c.task_names, "mean", "to the best static")
    below = budget in c.below
    note = "Difference of the mean: 95 % interval, paired over items and seeds; * leaves out 0; † best static router."
    grid = Grid(f"Tasks at {budget:g} ({layers} layers), %", head, tuple(rows), note)
    return grid if below else Grid(grid.title, head[:-1], tuple(row[:-1] for row in rows))


def _signed(found: Difference, scale: float = 1.0, digits: int = 2) -> str:
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low}, {high}){'*' if found.apart else ' '}"


def _by_budget(
    c: Comparison,
    title: str,
    budgets: dict[float, int],
    cell: Callable[[str, float], str],
    note: str = "",
    labels: Sequence[str] | None = None,
) -> Grid:
    head = ("router", *(f"{budget:g} ({layers})" for budget, layers in budgets.items()))
    domain = c.domains[0]
    rows = tuple(
        (label, *(cell(label, budget) if c.scores(label, domain, budget) else NONE for budget in budgets))
        for label in (c.labels if labels is None else labels)
    )
    return Grid(title, head, rows, note)
