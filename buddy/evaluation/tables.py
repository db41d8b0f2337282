"""The tables of results: printed, and as Markdown in the document results.md."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from buddy import console
from buddy.console import NONE
from buddy.evaluation.figures import CAPTIONS
from buddy.evaluation.results import FEWEST, Results

UNEVEN = 0.1  # layers by which a row's mean may miss K without a note
EXCEPTED = " Settings in brackets in a row's name stand in place of what is said here."
APART = f"excludes 0, over at least {FEWEST} documents or items"
MARKED = f"* below the best static router (†): the 95 % interval of the paired difference {APART}"
WRITTEN = "<!-- written by Buddy from comparison.json; change nothing here -->"


@dataclass(frozen=True)
class Table:
    """A table of text cells; the first column labels the rows."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""

    @property
    def has_numbers(self) -> bool:
        """Whether any cell holds a number; a table without one is not shown."""
        return any(cell not in (NONE, "†") for cells in self.rows for cell in cells[1:])


def show(results: Results) -> None:
    """Print all tables."""
    console.stdout.print(f"Backbone: {results.backbone}, {results.layers} layers")
    for table in all_tables(results):
        console.print_titled_table(table.title, table.head, table.rows, table.note)


def all_tables(r: Results) -> list[Table]:
    """Every table of the terminal, in the order of reading."""
    found = [make(r, text) for text in r.texts for make in (perplexities, differences)]
    found += [kl(r), costs(r), *speeds(r), *tasks(r), *flips(r)]
    return [table for table in found if table.has_numbers]


def perplexities(r: Results, text: str) -> Table:
    """Routers × budgets: the mean over seeds and its standard deviation."""

    def cell(row: pd.Series) -> str:
        std = number(row.perplexity_std)
        differs = row.layers < r.layers or float(std) > 0  # full depth, too, depends on the seed of an adapter
        spread = f" ±{std}" if row.seeds > 1 and differs else ""
        mark = "†" if row.best_static else "*" if row.significant and row.difference_high < 0 else ""
        return f"{number(row.perplexity)}{spread}{mark}"

    marks = MARKED if r.scores.best_static.any() else ""
    spreads = "± standard deviation over seeds" if (r.scores.seeds > 1).any() else ""
    note = "; ".join(filter(None, (marks, spreads)))
    note = f"{note and f'{note}.'}{_uneven(r)}".strip()
    return _by_budget(r, f"Perplexity on {text}", r.scores.loc[text].apply(cell, axis=1), r.budgets, note)


def differences(r: Results, text: str) -> Table:
    """Routers × budgets below full depth: mean cross-entropy minus that of the best static router."""
    best = r.scores.loc[text].query("best_static").reset_index()
    best = best.assign(budget=best.budget.map("{:g}".format)).sort_values("layers", ascending=False)
    where = best.groupby("router", sort=False).budget.agg(", ".join)
    names = "; ".join(f"{router} at {budgets}" for router, budgets in where.items())
    title = f"Difference to the best static router on {text}, nats per token"
    note = f"95 % intervals, paired over documents and seeds; * {APART}. † best static router: {names}.{_uneven(r)}"
    return _by_budget(r, title, r.scores.loc[text].apply(_signed, axis=1), r.below, note)


def _uneven(r: Results) -> str:
    uneven = (r.scores.executed_mean - r.scores.layers).abs().max() > UNEVEN
    return " Not every row ran K layers in the mean (see Cost)." if uneven else ""


def _timed_layers(r: Results) -> str:
    """Layers that the tokens ran whose decoding was timed, of each router where that was not K."""
    scores = r.scores.loc[r.texts[0]]
    ran = scores.decode_layers.astype(float)
    uneven = ran[(ran - scores.layers).abs() > UNEVEN].groupby("router", sort=False)
    means = {router: ", ".join(map("{:.1f}".format, each)) for router, each in uneven}
    return "".join(f" The timed tokens of {router} ran {layers} layers." for router, layers in means.items())


def kl(r: Results, text: str | None = None) -> Table:
    """Routers × budgets below full depth: KL to the dense model on one text, or the mean over all."""
    scores = r.scores if text is None else r.scores.loc[[text]]
    names = scores.index.unique("text")
    means = scores.groupby(["router", "budget"]).kl.mean()
    where = f" on {names[0]}" if len(names) == 1 else ", mean of all texts"
    title = f"KL to the dense model{where}, nats per token"
    return _by_budget(r, title, means.map(lambda mean: f"{max(mean, 0.0):.3f}"), r.below)


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
        "where they differ from K; in brackets, the mean of scored tokens, without prompts."
    )
    return _table("Cost", cells, note + (" Adapter lr: for each seed, the best on validation windows." * healed))


def speeds(r: Results) -> list[Table]:
    """Tokens a second in decoding and in reading a prompt, and multiply-adds; nothing where they were not measured."""
    if not (speed := r.record["speed"]):
        return []
    found, scores = [], r.scores.loc[r.texts[0]]
    for key, title, tokens in (("decode_ms", "Decode", 1), ("prefill_ms", "Prefill", speed["tokens"])):
        what = f"after a prompt of {speed['prompt']} tokens" if tokens == 1 else f"{tokens} tokens"
        threads = console.counted(speed["threads"], "thread")
        note = (
            f"Stock dense model: {number(1e3 * tokens / speed['dense'][key])}. One text at a time, {what}; medians "
            f"of {speed['rounds']} rounds, {threads}, one run of each router; full depth is one measurement for all."
        )
        note += _timed_layers(r) * (tokens == 1)
        rates = (1e3 * tokens / scores[key].astype(float)).map(number, na_action="ignore")
        found.append(_by_budget(r, f"{title}, tokens per second", rates, r.budgets, note))
    if "multiply_adds" in speed["dense"]:
        note = (
            f"Counted while {speed['tokens']} tokens are read: layers as computed (where most tokens run a layer, "
            f"it is computed for all), attention, keys and values of skipped layers, router and bridges; without the "
            f"head. Full depth is the dense model."
        )
        work = scores.multiply_adds.astype(float).map("{:.1f}".format, na_action="ignore")
        found.append(_by_budget(r, "Multiply-adds per token, millions", work, r.budgets, note))
    return found


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
        return NONE if pd.isna(row.flips) else f"{100 * row.flips:.1f}{'†' if row.flips_best_static else ''}"

    note = (
        "Share of answers that change between right and wrong against full depth, in percent: mean over tasks and "
        "seeds (2407.09141). † fewest of a static router."
    )
    title = "Flips, difference to the static router with the fewest, %"
    paired = f"95 % intervals, paired over items and seeds; * {APART}."
    shares = r.task_scores.apply(share, axis=1)
    signed = r.task_scores.apply(_signed, axis=1, scale=100, digits=1, prefix="flips_")
    return [
        _by_budget(r, "Flips against full depth, %", shares, r.below, note),
        _by_budget(r, title, signed, r.below, paired),
    ]


def number(value: float) -> str:
    """A positive number with about four digits: 27.78, 185.0, 31130, 1.2e6."""
    if 99999.5 <= value < math.inf:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits}e{int(power)}"
    return f"{value:.0f}" if value >= 999.95 else f"{value:.1f}" if value >= 99.995 else f"{value:.2f}"


def _tasks_at(r: Results, budget: float) -> Table:
    scores = r.task_scores.xs(budget, level="budget").reindex(r.routers.index)
    scores = scores[scores[r.tasks].notna().any(axis=1)]
    shares = scores[[*r.shares, "mean"]].map(lambda share: NONE if pd.isna(share) else f"{100 * share:.1f}")
    others = scores[[name for name in r.tasks if name not in r.shares]].map(
        lambda value: NONE if pd.isna(value) else f"{value:.4g}"
    )
    cells = shares.join(others)[[*r.tasks, "mean"]]
    cells.insert(0, "router", scores.index)
    title = f"Tasks at {budget:g} ({r.budgets[budget]} layers), %"
    if budget not in r.below:
        return _table(title, cells)
    difference = scores.apply(_signed, axis=1, scale=100, digits=1)
    note = f"Difference of the mean: 95 % interval, paired over items and seeds; * {APART}; † best static router."
    if r.shares != r.tasks:
        note += " Columns of other metrics are no percentages, and the mean leaves them out."
    return _table(title, cells.assign(**{"to the best static": difference}), note)


def _signed(row: pd.Series, scale: float = 1.0, digits: int = 2, prefix: str = "") -> str:
    """A difference with its interval; † for the router that others are compared to."""
    if pd.isna(row[f"{prefix}difference"]):
        return "†" if row[f"{prefix}best_static"] else NONE
    mean, low, high = (f"{scale * row[f'{prefix}difference{end}']:+.{digits}f}" for end in ("", "_low", "_high"))
    bounds = "" if pd.isna(row[f"{prefix}difference_low"]) else f" ({low}, {high})"
    return f"{mean}{bounds}{'*' if row[f'{prefix}significant'] else ' '}"


def _by_budget(r: Results, title: str, texts: pd.Series, budgets: Mapping[float, int], note: str = "") -> Table:
    """A row for each router and a column for each budget, of texts by (router, budget)."""
    cells = texts.astype(object).unstack("budget").reindex(index=r.routers.index, columns=[*budgets]).fillna(NONE)
    cells.columns = [f"{budget:g} ({layers})" for budget, layers in budgets.items()]
    return _table(title, cells.rename_axis("router").reset_index(), note)


def _table(title: str, cells: pd.DataFrame, note: str = "") -> Table:
    return Table(title, [str(name) for name in cells.columns], cells.to_numpy().tolist(), note)


def _executed(r: Results, router: str) -> str:
    """Layers that tokens ran over all texts and seeds, at each budget where that was not K for all."""
    found = []
    names = ["executed_min", "executed_mean", "executed_max", "executed_scored"]
    own = r.runs.xs(router, level="router").reindex(columns=names)
    for budget, layers in r.budgets.items():
        ran = own[own.index.get_level_values("budget") == budget]
        if (ran[names[:3]] != layers).any(axis=None):
            least, mean, most = ran.executed_min.min(), ran.executed_mean.mean(), ran.executed_max.max()
            scored = "" if ran.executed_scored.isna().any() else f" ({ran.executed_scored.mean():.2f})"
            found.append(f"{layers}: {least:.0f}/{mean:.2f}/{most:.0f}{scored}")
    return "; ".join(found) or "as asked"


# The document


def render(r: Results, figures: Mapping[str, str]) -> str:
    """The document, with links to figures by name."""
    return "\n".join(_lines(r, figures)).rstrip() + "\n"


def _lines(r: Results, figures: Mapping[str, str]) -> Iterator[str]:
    parts = ["bridges"] * ("bridge.rank" in r.record["recipe"]) + ["a LoRA adapter"] * _healed(r)
    what = f"with {' and '.join(parts)}" if parts else "without bridges"
    yield from (WRITTEN, f"# Results of {r.backbone} {what}{' on tasks' * bool(r.tasks)}", "")
    yield from _protocol(r)
    for text in r.texts:
        yield from (f"## {text}", "")
        yield from _markdown(perplexities(r, text), differences(r, text), kl(r, text))
    if figures:
        yield from ("## Figures", "")
        for name, link in figures.items():
            yield from (f"![{CAPTIONS[name].partition(';')[0].rstrip('.')}]({link})", "", CAPTIONS[name], "")
    yield from ("## Cost", "")
    yield from _markdown(costs(r), *speeds(r))
    if r.tasks:
        yield from ("## Tasks", "", _task_protocol(r), "")
        yield from _markdown(*tasks(r), *flips(r))
    if r.record["failures"]:
        yield from ("## Failed", "")
        for each in r.record["failures"]:
            yield f"- {each['router']}, seed {each['seed']}: it failed, so this seed is not in the tables."
        yield ""
    yield from _provenance(r)


def _markdown(*found: Table) -> Iterator[str]:
    for table in found:
        if table.has_numbers:
            yield from (f"**{table.title}**", "", markdown(table.head, table.rows))
            if table.note:
                yield from (re.sub(r"^\*", r"\\*", table.note), "")  # otherwise Markdown makes it a list


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, a line for each row; the first column labels the rows, the others are aligned right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    cells = ([cell.replace("|", "\\|").strip() for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _protocol(r: Results) -> Iterator[str]:
    recipe = r.record["recipe"]
    layers = ", ".join(f"{budget:g} ({count})" for budget, count in r.budgets.items())
    sinks = console.counted(recipe["routing.sink_tokens"], "token")
    over = int(recipe.get("routing.mean_over", 1))
    held = f", in the mean over {over} tokens" if over > 1 else ""
    yield (
        f"{console.counted(len(r.routers), 'router')} under one recipe: {r.backbone} ({r.layers} layers, "
        f"{recipe['backbone.dtype']}), {_learned(r)}, "
        f"at the budgets (executed layers) {layers}{held}. "
        f"All see the same {r.record.get('calibration_windows', recipe['data.calibration_windows'])} calibration "
        f"windows and "
        f"the same {recipe.get('data.evaluate_on', 'test')} windows of {recipe['data.window']} tokens, of which the "
        f"first {recipe['data.prompt']} are not scored. Sinks, {sinks} at the start of each window, run at full depth "
        "at every budget."
    )
    if recipe.get("fixed", "null") != "null":
        yield f"The settings were fixed (`fixed={recipe['fixed']}`) before any test window was read."
    yield ""
    yield "| text | windows | documents | scored tokens |\n|---|---:|---:|---:|"
    tokens = r.runs.tokens.groupby("text").first()
    for text in r.record["domains"]:
        name = text["label"] + (" (the recipe's own)" if text["own"] else "")
        yield f"| {name} | {text['windows']} | {text['documents']} | {tokens[text['label']]:.0f} |"
    yield ""
    yield (
        "Perplexity is the exponential of the mean cross-entropy over all scored tokens; with several seeds it is the "
        "mean of their perplexities (Cost has their number). Differences are of mean cross-entropy, negative if a "
        "router is better than the best static one. Intervals are 95 % bootstrap intervals that resample seeds, and "
        "documents, the same for both routers; those of a row with one seed leave the variance between seeds out. The "
        "best static router is the best on these test windows at that budget, a choice that favours it. "
        f"Intervals are not corrected for multiple comparisons. {_at_full_depth(r)}"
        f"{EXCEPTED * any('[' in label for label in r.routers.index)}"
    )
    yield ""


def _healed(r: Results) -> bool:
    return "adapter.steps" in r.record["recipe"]


def _at_full_depth(r: Results) -> str:
    """Full depth, which all rows share; how adapters or bridges were trained."""
    recipe = r.record["recipe"]
    batches = f"steps of {recipe['data.batch_size']} windows on {_texts(r, 'data.train_sources')}"
    bridges, rate, joint = (recipe.get(f"bridge.{key}") for key in ("steps", "lr", "joint"))
    if not _healed(r):
        steps = bridges + recipe["trainer.max_steps"] if joint else bridges
        trained = f"Bridges are trained for {steps} {batches}, at rate {rate}"
        trained += f"; {recipe['trainer.max_steps']} of them train a router with parameters too. " if joint else ". "
        but = ", but for rows with an adapter," * any("adapter." in label for label in r.routers.index)
        return f"{trained * bool(steps)}At full depth all routers{but} are the dense model."
    beside = f" Bridges are trained in the same steps, at rate {rate}." * bool(bridges or joint)
    rate = "the learning rates under Cost" if "adapter_lr" in r.fits else f"learning rate {recipe['adapter.lr']:g}"
    return (
        f"All are healed in the same way: one LoRA adapter of rank {recipe['adapter.rank']} for all budgets on frozen "
        f"weights, {recipe['adapter.steps']} {batches}, at {rate}. It is active at full depth too, so rows differ "
        f"there.{beside}"
    )


def _learned(r: Results) -> str:
    """The texts of calibration and of training."""
    calibrated, trained = (_texts(r, f"data.{name}_sources") for name in ("calibration", "train"))
    if calibrated == trained:
        return f"calibrated or trained on {calibrated}"
    return f"all calibrated on {calibrated}, those with parameters trained on {trained}"


def _texts(r: Results, key: str) -> str:
    own = next(text["label"] for text in r.record["domains"] if text["own"])
    more = str(r.record["recipe"].get(key, "[]")).strip("[]")
    names = [own, *(source.strip().rpartition("/")[2] for source in more.split(",") if source.strip())]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} in turn"


def _task_protocol(r: Results) -> str:
    limit = r.record["tasks"]["limit"]
    items = f"the first {limit} items of each" if limit else "all items"
    return (
        f"lm-eval, zero-shot unless a task says otherwise, {items}; accuracy normalised by length where the task has "
        "it, in percent, mean over seeds. The question is the prompt; the answer's tokens are decode steps."
    )


def _provenance(r: Results) -> Iterator[str]:
    """Command, date, machine and versions, of each part of a joined record."""
    yield from ("## How it was made", "")
    for part in r.record.get("parts", [r.record]):
        machine = part["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
        memory = f", {machine['memory_gib']:g} GiB of memory" if machine["memory_gib"] else ""
        accelerator = f", {machine['accelerator']}" if machine["accelerator"] else ""
        where = f"{machine['processor']}, {machine['cores']} cores{memory}{accelerator}"
        yield from ("```text", part["command"], "```", "")
        yield from (f"{part['created'].partition('T')[0]}, {where}. {versions}.", "")
