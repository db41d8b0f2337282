"""`buddy inspect`: which layers a finished run executes for which token: numbers, figures and lines in a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.text import Text as Line

from buddy.budget import format_budget
from buddy.builders.model import load_model
from buddy.console import NONE, counted, print_titled_table, status, stdout, tracker
from buddy.data.text import named_sources
from buddy.errors import DataError, RunError
from buddy.inspection.figures import draw_all, write_tensorboard
from buddy.inspection.routing import (
    ALWAYS,
    CHOSEN,
    SINK,
    SKIPPED,
    SPAN,
    Inspection,
    Measures,
    observe,
    read_text,
    typed_text,
)
from buddy.io import check_output_path, check_parent, within_memory, write_json, writing
from buddy.router import available_budgets
from buddy.run import read_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER, NUMBERS = "routing", "routing.json"  # in a run folder; in that folder
OWN_FILES = re.compile(rf"{re.escape(NUMBERS)}|(tokens|domains)-\d+(\.\d+)?(layers|ms)?\.png")
WINDOWS = 16
PRINTED = 0.75  # the budget nearest to this one is printed token by token
LABEL_LENGTH = 14  # characters
INVISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
SIGNS = {SKIPPED: ("·", "dim"), CHOSEN: ("█", "blue"), ALWAYS: ("▒", "dim"), SINK: ("█", "yellow")}
HEIGHTS = "▁▂▃▄▅▆▇█"


def inspect_run(
    folder: Path,
    *,
    budgets: Sequence[str] | None = None,
    domains: str | None = None,
    text: str | None = None,
    windows: int | None = None,
    out: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Print tables of a run's plans, draw figures, write the numbers.

    Args:
        folder: the run.
        budgets: instead of the recipe's.
        domains: texts as "SOURCE,label=SOURCE,…" instead of the recipe's test text.
        text: a text to inspect token by token, instead of any domain.
        windows: most windows of each domain; 16 by default.
        out: the folder for all output, instead of `routing` in the run folder for figures and numbers, and the run
            folder itself for TensorBoard.
        json_file: the file for the numbers.

    Raises:
        BuddyError: the run, a budget or a text cannot be used, or a file cannot be written.
    """
    run = read_run(folder)
    target = out or run.folder / FOLDER
    _check_options(target, text, domains, windows)
    sources = {} if text is not None else named_sources(domains, run.recipe.data.source)
    if json_file and (os.path.isdir(target) or json_file.absolute().parent != target.absolute()):  # it is made
        own = [each for each in run.folder.iterdir() if each.name != FOLDER]  # figures and numbers are replaced
        check_output_path(json_file, *own, *run.inputs[1:], *sources.values())
    with status(f"Loading {run.backbone} …"):
        routed = load_model(run)
    wanted = available_budgets(routed.router, run.recipe.budgets) if budgets is None else budgets
    counts = [(routed.executed_layers(budget), format_budget(budget)) for budget in wanted]
    executed = {budget: count for count, budget in sorted(counts, key=lambda pair: -pair[0])}
    if text is not None:
        texts = [typed_text(routed, text)]
    else:
        with status("Reading text …"):
            texts = [read_text(run, routed, *source, windows or WINDOWS) for source in sources.items()]
    batch, ids = run.recipe.data.batch_size, texts[0].windows.input_ids
    with within_memory(f"a batch of {batch} × {ids.shape[1]} tokens"):
        track = tracker(f"Routing {run.router_name}")
        runs = observe(routed, texts, executed.values(), batch_size=batch, track=track)
    words = token_labels(routed.backbone.tokenizer, ids[0].tolist())
    inspection = Inspection(
        run.router_name, routed.geometry, routed.sink_tokens, routed.mean_over, executed, texts, runs, words
    )
    written = _write(inspection, target, out or run.folder, json_file or target / NUMBERS)
    _print_tables(inspection)
    if text is not None:
        layers = inspection.geometry.layers
        _print_tokens(inspection, min(executed, key=lambda budget: abs(executed[budget] / layers - PRINTED)))
    for line in written:
        stdout.print(line)


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """A short label for each token: its text without the spaces around it, shortened; spaces, line ends and other
    invisible characters become visible ones.
    """
    return [_label(tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)) for token in ids]


def token_lines(inspection: Inspection, count: int) -> Iterator[Line]:
    """A ruler and a line for each token at K: label, a character for each layer, how many layers changed."""
    width = max(map(cell_len, inspection.words))
    ruler = "".join(str(layer).ljust(5) for layer in range(0, inspection.geometry.layers, 5)).rstrip()
    yield Line(" " * width + "  " + ruler, style="dim")
    kinds, changes = inspection.kinds(count), inspection.changed(count)
    for token, label in enumerate(inspection.words):
        line = Line(set_cell_size(label, width) + "  ")
        for kind in kinds[token]:
            line.append(*SIGNS[kind])
        if token < inspection.sinks:
            line.append("  sink", style="dim")
        elif changes[token]:
            line.append(f"  {changes[token]} changed", style="dim")
        yield line


def _check_options(target: Path, text: str | None, domains: str | None, windows: int | None) -> None:
    """Check the options before the model is loaded."""
    if text is not None and (domains is not None or windows is not None):
        raise DataError("--text inspects that text alone; leave out --domains and --windows, or --text.")
    if os.path.exists(target) and not os.path.isdir(target):
        raise RunError(f"{target} is a file; name a folder for the figures.")
    check_parent(target)


def _print_tables(inspection: Inspection) -> None:
    """The measures of each text at each budget, and a line of characters: how many tokens ran each layer."""
    rows = [
        (f"{budget} ({count}), {label}", *_cells(found))
        for budget, count in inspection.executed.items()
        for label, found in inspection.measures[count].items()
    ]
    span = min(SPAN, inspection.texts[0].windows.input_ids.shape[1] - inspection.sinks)
    head = [
        "budget (layers), text",
        "plan changes",
        "layers apart",
        "plans",
        f"in {span} tokens",
        "most frequent",
        "other layers",
    ]
    head.append(f"share of tokens, layers 0 to {inspection.geometry.layers - 1}")
    sizes = "; ".join(
        f"{text.label}: {counted(text.windows.input_ids.numel() - inspection.sinks * len(text.windows), 'token')} in "
        f"{counted(len(text.windows), 'window')} of {counted(len(text.windows.documents.unique()), 'document')}"
        for text in inspection.texts
    )
    sinks = f"; sink tokens, run at full depth and left out: {inspection.sinks} a window" if inspection.sinks else ""
    mean = f"Layers are those of the budget{inspection.mean}. " if inspection.mean else ""
    note = (
        f"{mean}Plan changes: tokens whose plan is not that of the token before; layers apart: in how many layers "
        f"these two differ, on average. Plans: distinct ones, in all and in {span} tokens. Most frequent: tokens with "
        "the text's most frequent plan. Other layers: executed ones that the most frequent plan of all texts skips. "
        f"Share of tokens that ran each layer: {HEIGHTS[0]} few … {HEIGHTS[-1]} all, · none.\n{sizes}{sinks}."
    )
    print_titled_table(f"Plans of {inspection.router}", head, rows, note)


def _cells(found: Measures) -> list[str]:
    return [
        NONE if found.changes is None else f"{found.changes:.1%}",
        NONE if found.apart is None else f"{found.apart:.2f}",
        str(found.plans),
        f"{found.distinct:.1f}",
        f"{found.commonest:.1%}",
        f"{found.off_commonest:.1%}",
        "".join(HEIGHTS[min(7, int(part * 8))] if part > 0 else "·" for part in found.share),
    ]


def _print_tokens(inspection: Inspection, budget: str) -> None:
    """The first text token by token at one budget."""
    count, layers = inspection.executed[budget], inspection.geometry.layers
    legend = f"Layers 0 to {layers - 1} from left to right: █ ran, chosen  ▒ always runs  · skipped"
    stdout.print(f"\nBudget {budget}: {count} of {layers} layers{inspection.mean}. {legend}")
    for line in token_lines(inspection, count):
        stdout.print(line)


def _write(inspection: Inspection, target: Path, board: Path, numbers: Path) -> list[str]:
    """Write all files before tables are printed, whose reader may close the pipe; lines that name them."""
    with status("Drawing …"), writing(target):
        target.mkdir(exist_ok=True)
        for path in list(target.iterdir()):  # an earlier call may have had other budgets or texts
            if OWN_FILES.fullmatch(path.name) and path.is_file():
                path.unlink()
        drawn = draw_all(inspection, target)
        write_tensorboard(inspection, drawn, board)
    write_json(numbers, inspection.as_json())
    return [
        f"Pictures:    {', '.join(path.name for path in drawn.values())} in {target}",
        f"JSON:        {numbers}",
        f"TensorBoard: tensorboard --logdir {board}",
    ]


def _label(text: str) -> str:
    characters = (
        INVISIBLE.get(one) or (one if one.isprintable() else f"\\{ord(one):x}") for one in text.strip(" ") or text
    )
    label = "".join(characters)
    return label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"
