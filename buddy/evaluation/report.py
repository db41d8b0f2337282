"""The files of a comparison: JSON, CSV, figures, TensorBoard, and results.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from buddy import console
from buddy.evaluation.figures import CAPTIONS, draw_all, draw_scores, write_scores, write_tensorboard
from buddy.evaluation.record import damaged_record, join, read_record, write_record
from buddy.evaluation.results import Results
from buddy.evaluation.tables import Table, costs, differences, flips, kl, perplexities, seeds, show, speeds, tasks
from buddy.io import check_output_path, write_text
from buddy.metrics.perplexity import Scores, with_documents
from buddy.schema import Recipe

JSON, CSV, MARKDOWN = "comparison.json", "comparison.csv", "results.md"
FIGURE = "loss.png"  # of a run
WRITTEN = "<!-- written by `buddy compare` from comparison.json; change nothing here -->"


def write(record: Mapping[str, Any], folder: Path, markdown: Path | None = None) -> None:
    """Write JSON, CSV, Markdown, figures and TensorBoard's files into a folder, and print the tables.

    Args:
        record: of `buddy.evaluation.record.collect`.
        folder: of the comparison.
        markdown: where the document is written once more.
    """
    results = Results(record)
    write_record(folder / JSON, record)
    write_text(folder / CSV, results.csv())
    figures = write_markdown(results, folder / MARKDOWN)
    write_tensorboard(results, folder, figures)
    show(results)
    if markdown:
        write_markdown(results, markdown, f"{markdown.stem}-")
    lines = {
        "Results": markdown or folder / MARKDOWN,
        "Figures": ", ".join(map(str, figures.values())),
        "Data": f"{folder / JSON}, {folder / CSV}",
        "TensorBoard": f"tensorboard --logdir {folder}",
    }
    for name, where in lines.items():
        console.results.print(f"{name + ':':12} {where}", soft_wrap=True)


def write_run_results(
    folder: Path,
    recipe: Recipe,
    scores: Sequence[Scores],
    *,
    fit: Mapping[str, float],
    windows: str,
) -> dict[str, Any]:
    """Write a run's figure and TensorBoard's curves and settings.

    Args:
        folder: of the run.
        recipe: of the run.
        scores: on the recipe's test windows.
        fit: "seconds" that calibration and training took and "parameters" of the router.
        windows: fingerprint of the test windows.

    Returns:
        The content of metrics.json, with the sums of every document; the run is complete once it is written.
    """
    draw_scores(scores, folder / FIGURE)
    write_scores(folder, recipe, scores, fit)
    return with_documents(scores) | {"fit": dict(fit), "windows": windows}


def show_files(files: Sequence[Path], markdown: Path | None = None) -> None:
    """`buddy compare --from`: show one comparison.json or several as one, and write them as Markdown with figures.

    Args:
        files: several are joined.
        markdown: where to write the document; None for nowhere.

    Raises:
        RunError: a file is no comparison, they cannot be joined, or the document cannot be written.
    """
    records = {path: read_record(path) for path in dict.fromkeys(files)}
    for path, record in records.items():
        try:
            render(results := Results(record), {})
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise damaged_record(path) from error
    if len(records) > 1:
        results = Results(join(records))
    if markdown:
        check_output_path(markdown, *files)
        write_markdown(results, markdown, f"{markdown.stem}-")
    show(results)


def write_markdown(results: Results, path: Path, prefix: str = "") -> dict[str, Path]:
    """Write the document with its figures beside it.

    Returns:
        The figures by name.
    """
    figures = draw_all(results, path.parent, prefix)
    write_text(
        path, render(results, {name: each.relative_to(path.parent).as_posix() for name, each in figures.items()})
    )
    return figures


def render(r: Results, figures: Mapping[str, str]) -> str:
    """The document, with links to figures by name."""
    return "\n".join(_lines(r, figures)).rstrip() + "\n"


def _lines(r: Results, figures: Mapping[str, str]) -> Iterator[str]:
    yield from (WRITTEN, "# Results, healed" if _healed(r) else "# Results", "")
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
    spreads = [table for text in r.texts if (table := seeds(r, text)).rows]
    if spreads:
        yield from ("## Seeds", "", "Routers that depend on a seed.", "")
        yield from _markdown(*spreads)
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
        if table.rows:
            lines = [table.head, ["---", *("---:" for _ in table.head[1:])], *table.rows]
            cells = ([cell.replace("|", "\\|").strip() for cell in line] for line in lines)
            yield from (f"**{table.title}**", "", "".join(f"| {' | '.join(line)} |\n" for line in cells))
            if table.note:
                yield from (re.sub(r"^\*", r"\\*", table.note), "")  # otherwise Markdown makes it a list


def _protocol(r: Results) -> Iterator[str]:
    recipe = r.record["recipe"]
    layers = ", ".join(f"{budget:g} ({count})" for budget, count in r.budgets.items())
    yield (
        f"{len(r.routers)} routers under one recipe: {r.backbone} ({r.layers} layers, "
        f"{recipe['backbone.dtype']}), {_learned(r)}, "
        f"at the budgets (executed layers) {layers}. "
        f"{_seeds(r)} All see the same {recipe['data.calibration_windows']} calibration windows and "
        f"the same test windows of {recipe['data.window']} tokens, of which the first {recipe['data.prompt']} are not "
        f"scored. The first {recipe['routing.sink_tokens']} of each window run at full depth at every budget."
    )
    yield ""
    yield "| text | windows | documents | scored tokens |\n|---|---:|---:|---:|"
    tokens = r.runs.tokens.groupby("text").first()
    for text in r.record["domains"]:
        name = text["label"] + (" (the recipe's own)" if text["own"] else "")
        yield f"| {name} | {text['windows']} | {text['documents']} | {tokens[text['label']]:.0f} |"
    yield ""
    yield (
        "Perplexity is the exponential of the mean cross-entropy over all scored tokens; with several seeds it is the "
        "mean of their perplexities. Differences are of mean cross-entropy, negative if a router is better than the "
        "best static one. Intervals are 95 % bootstrap intervals that resample seeds, and documents, the same for both "
        "routers. The best static router is the best on these test windows at that budget, a choice that favours it. "
        f"Intervals are not corrected for multiple comparisons. {_at_full_depth(r)}"
    )
    yield ""


def _healed(r: Results) -> bool:
    return "adapter.steps" in r.record["recipe"]


def _at_full_depth(r: Results) -> str:
    """Full depth, which all rows share; with adapters, how they were trained."""
    recipe = r.record["recipe"]
    if not _healed(r):
        return "At full depth all routers are the dense model."
    return (
        f"All are healed in the same way: one LoRA adapter of rank {recipe['adapter.rank']} for all budgets on frozen "
        f"weights, {recipe['adapter.steps']} steps of {recipe['data.batch_size']} windows on "
        f"{_texts(r, 'data.train_sources')}, at {_rate(r)}. It is active at full depth too, so rows differ there."
    )


def _rate(r: Results) -> str:
    """The learning rate of healing, or those tried by a comparison of 0.1."""
    recipe = r.record["recipe"]
    parts = r.record.get("parts", [{"rates": recipe.get("adapter.rates")}])
    tried = list(dict.fromkeys((part["rates"] or "").strip("[]") or f"{recipe['adapter.lr']:g}" for part in parts))
    if len(tried) > 1:
        return f"the best of the rates {' or of '.join(tried)} (see each run's command) on validation windows"
    return f"the best of the rates {tried[0]} on validation windows" if "," in tried[0] else f"learning rate {tried[0]}"


def _learned(r: Results) -> str:
    """The texts of calibration and of training."""
    calibrated, trained = (_texts(r, f"data.{name}_sources") for name in ("calibration", "train"))
    if calibrated == trained:
        return f"calibrated or trained on {calibrated}{_own_rates(r)}"
    return f"all calibrated on {calibrated}, those with parameters trained on {trained}{_own_rates(r)}"


def _own_rates(r: Results) -> str:
    """The learning rates by router of a comparison of 0.1."""
    recipe, names = r.record["recipe"], set(r.routers.name)
    rates = str(recipe.get("optimizer.lr_by_router", "{}")).strip("{}").split(", ")
    own = ", ".join(rate for rate in rates if rate.partition(":")[0] in names)
    return f" (learning rate {recipe['optimizer.lr']:g}; {own})" if own else ""


def _texts(r: Results, key: str) -> str:
    own = next(text["label"] for text in r.record["domains"] if text["own"])
    more = str(r.record["recipe"].get(key, "[]")).strip("[]")
    names = [own, *(source.strip().rpartition("/")[2] for source in more.split(",") if source.strip())]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} in turn"


def _seeds(r: Results) -> str:
    counts = r.fits.groupby("router", sort=False).size()
    if counts.nunique() == 1:
        count = counts.iloc[0]
        text = "" if count == 1 else " All use the same text."
        return f"Each was fitted with {'one seed' if count == 1 else f'{count} seeds'}.{text}"
    many = ", ".join(f"{router} ({count})" for router, count in counts.items() if count > 1)
    rest = "; the others once" if (counts == 1).any() else ""
    return f"Fitted with several seeds: {many}{rest}. All use the same text."


def _task_protocol(r: Results) -> str:
    limit = r.record["tasks"]["limit"]
    items = f"the first {limit} items of each" if limit else "all items"
    return (
        f"lm-eval, zero-shot unless a task says otherwise, {items}; accuracy normalised by length where the task has "
        "it, in percent, mean over seeds. The question is the prompt; the answer's tokens are decode steps."
    )


def _provenance(r: Results) -> Iterator[str]:
    """Command, date, machine and versions of each part of a joined record."""
    yield from ("## How it was made", "")
    for part in r.record.get("parts", [r.record]):
        machine = part["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in part["versions"].items())
        memory = f", {machine['memory_gib']:g} GiB of memory" if machine["memory_gib"] else ""
        accelerator = f", {machine['accelerator']}" if machine["accelerator"] else ""
        where = f"{machine['processor']}, {machine['cores']} cores{memory}{accelerator}"
        yield from ("```text", part["command"], "```", "")
        yield from (f"{part['created'].partition('T')[0]}, {where}. {versions}.", "")
