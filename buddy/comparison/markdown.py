"""results.md, made from the record alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from buddy.comparison import tables
from buddy.comparison.figures import LAYERS, TIME
from buddy.comparison.grid import Grid
from buddy.comparison.grid import markdown as as_markdown
from buddy.comparison.view import Comparison

WRITTEN = "<!-- written by `buddy compare` from comparison.json; change nothing here -->"
CAPTIONS = {
    LAYERS: "Cross-entropy over executed layers; bands are 95 % intervals over documents and seeds. A line that is far "
    "worse than the others leaves its panel at the top; the tables have it.",
    TIME: "Cross-entropy over the measured time of a decoded token, one point for each budget.",
}


def render(comparison: Comparison, figures: Mapping[str, str]) -> str:
    """The document.

    Args:
        comparison: what is reported.
        figures: where each figure is, as a link from the document.
    """
    return "\n".join(_lines(comparison, figures)).rstrip() + "\n"


def relative(figures: Mapping[str, Path], document: Path) -> dict[str, str]:
    """Links to figures that lie in the folder of the document."""
    return {name: path.relative_to(document.parent).as_posix() for name, path in figures.items()}


def _lines(c: Comparison, figures: Mapping[str, str]) -> Iterator[str]:
    yield from (WRITTEN, "# Results, healed" if _heals(c) else "# Results", "")
    yield from _protocol(c)
    for domain in c.domains:
        yield from (f"## {domain}", "")
        yield from _table(tables.perplexities(c, domain))
        yield from _table(tables.differences(c, domain))
        yield from _table(tables.kl_grid(c, domain))
    if figures:
        yield from ("## Figures", "")
        for name, link in figures.items():
            yield from (f"![{CAPTIONS[name].partition(';')[0].rstrip('.')}]({link})", "", CAPTIONS[name], "")
    yield from ("## Cost", "")
    for grid in (tables.costs(c), *tables.speeds(c)):
        yield from _table(grid)
    spreads = [grid for domain in c.domains if (grid := tables.seeds(c, domain)).rows]
    if spreads:
        yield from ("## Seeds", "", "Routers that depend on a seed, each fitted with several.", "")
        for grid in spreads:
            yield from _table(grid)
    if c.task_names:
        yield from ("## Tasks", "", _task_protocol(c), "")
        for grid in (*tables.tasks(c), *tables.flips(c)):
            yield from _table(grid)
    yield from _failures(c)
    yield from _provenance(c)


def _table(grid: Grid) -> Iterator[str]:
    if grid.rows:
        yield from (f"**{grid.title}**", "", as_markdown(grid))
        if grid.note:
            yield from (re.sub(r"^\*", r"\\*", grid.note), "")  # or it were a list


def _protocol(c: Comparison) -> Iterator[str]:
    recipe, record = c.record["recipe"], c.record
    layers = ", ".join(f"{budget:g} ({count})" for budget, count in c.budgets.items())
    yield (
        f"{len(c.labels)} routers under one recipe: {recipe['backbone.name']} ({record['layers']} layers, "
        f"{recipe['backbone.dtype']}), {_learned(c)}, "
        f"at the budgets (executed layers) {layers}. "
        f"{_seeds(c)} All see the same {recipe['data.calibration_windows']} calibration windows and "
        f"the same test windows of {recipe['data.window']} tokens, of which the first {recipe['data.prompt']} are read "
        f"and not scored. The first {recipe['routing.sink_tokens']} of each run at full depth, whatever the budget."
    )
    yield ""
    yield "| text | windows | documents | scored tokens |\n|---|---:|---:|---:|"
    for domain in record["domains"]:
        tokens = c.runs(c.labels[0])[0]["domains"][domain["label"]]["results"][0]["tokens"]
        name = domain["label"] + (" (the recipe's own)" if domain["own"] else "")
        yield f"| {name} | {domain['windows']} | {domain['documents']} | {tokens} |"
    yield ""
    yield (
        "Perplexity is the exponential of the mean cross-entropy over all scored tokens, and where there are several "
        "seeds the mean of their perplexities. Differences are of mean cross-entropy, negative where a router is "
        "better than the best static one: 95 % bootstrap intervals that resample documents, the same for both "
        "routers, and seeds. The best static router is the one that is best on these test windows at that budget, "
        "which favours it: nobody could have chosen it beforehand. Intervals are not corrected for the number of "
        f"comparisons. {_at_full_depth(c)}"
    )
    yield ""


def _heals(c: Comparison) -> bool:
    return "adapter.steps" in c.record["recipe"]


def _at_full_depth(c: Comparison) -> str:
    """What all rows have in common there; with adapters, what these are."""
    recipe = c.record["recipe"]
    if not _heals(c):
        return "At full depth all routers are the dense model."
    return (
        f"All are healed alike: one LoRA adapter of rank {recipe['adapter.rank']} for all budgets beside the frozen "
        f"weights, {recipe['adapter.steps']} steps of {recipe['data.batch_size']} windows on "
        f"{_texts(c, 'data.train_sources')}, at {_rate(c)}. It is on at full depth too, so that rows differ there."
    )


def _rate(c: Comparison) -> str:
    """The learning rate of healing, or those that were tried: not the same for all where records were joined."""
    recipe = c.record["recipe"]
    parts = c.record.get("parts", [{"rates": recipe.get("adapter.rates")}])
    tried = list(dict.fromkeys((part["rates"] or "").strip("[]") or f"{recipe['adapter.lr']:g}" for part in parts))
    if len(tried) > 1:
        return f"the best of the rates {' or of '.join(tried)} (each run's command says which) by validation windows"
    return f"the best of the rates {tried[0]} by validation windows" if "," in tried[0] else f"the rate {tried[0]}"


def _own(c: Comparison) -> str:
    return next(domain["label"] for domain in c.record["domains"] if domain["own"])


def _learned(c: Comparison) -> str:
    """What routers were calibrated on, and trained on where that is another text."""
    calibrated, trained = (_texts(c, f"data.{name}_sources") for name in ("calibration", "train"))
    if calibrated == trained:
        return f"calibrated or trained on {calibrated}{_lr(c)}"
    return f"all calibrated on {calibrated}, and those with weights trained on {trained}{_lr(c)}"


def _lr(c: Comparison) -> str:
    """The learning rates where they are not the same for all."""
    recipe, names = c.record["recipe"], {each["name"] for each in c.record["routers"]}
    rates = str(recipe.get("optimizer.lr_by_router", "{}")).strip("{}").split(", ")
    own = ", ".join(rate for rate in rates if rate.partition(":")[0] in names)
    return f" (learning rate {recipe['optimizer.lr']:g}; {own})" if own else ""


def _texts(c: Comparison, key: str) -> str:
    more = str(c.record["recipe"].get(key, "[]")).strip("[]")
    names = [_own(c), *(source.strip().rpartition("/")[2] for source in more.split(",") if source.strip())]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} in turn"


def _seeds(c: Comparison) -> str:
    counts = {label: len(c.runs(label)) for label in c.labels}
    same = set(counts.values())
    if len(same) == 1:
        count = same.pop()
        text = "" if count == 1 else " The text is the same for all."
        return f"Each was fitted with {'one seed' if count == 1 else f'{count} seeds'}.{text}"
    many = ", ".join(f"{label} ({count})" for label, count in counts.items() if count > 1)
    rest = "; the others once" if 1 in same else ""
    return f"Fitted with several seeds: {many}{rest}. The text is the same for all."


def _task_protocol(c: Comparison) -> str:
    limit = c.record["tasks"]["limit"]
    items = f"the first {limit} items of each" if limit else "all items"
    return (
        f"lm-eval, zero-shot unless a task says otherwise, {items}; accuracy normalised by length where the task has "
        "it, in percent, the mean over seeds. The plan comes from the question; the answer's tokens are decode steps."
    )


def _failures(c: Comparison) -> Iterator[str]:
    if c.record["failures"]:
        yield from ("## Failed", "")
        for each in c.record["failures"]:
            yield f"- {each['router']}, seed {each['seed']}: it failed and is not in the tables, or not with this seed."
        yield ""


def _provenance(c: Comparison) -> Iterator[str]:
    """The command, the day, the machine and the versions; of each part where several records were joined."""
    yield from ("## How it was made", "")
    for part in c.record.get("parts", [c.record]):
        machine = part["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
        memory = f", {machine['memory_gib']:g} GiB of memory" if machine["memory_gib"] else ""
        accelerator = f", {machine['accelerator']}" if machine["accelerator"] else ""
        where = f"{machine['processor']}, {machine['cores']} cores{memory}{accelerator}"
        yield from ("```text", part["command"], "```", "")
        yield from (f"{part['created'].partition('T')[0]}, {where}. {versions}.", "")
