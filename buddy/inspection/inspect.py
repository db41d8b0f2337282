"""`buddy inspect`: which layers a finished run spends on which token, as numbers and pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.table import Table
from rich.text import Text

from buddy.budget import shown
from buddy.build import load_model
from buddy.console import results, status, tracker
from buddy.data.text import sources_of
from buddy.engine.model import RoutedLM
from buddy.errors import DataError, RunError
from buddy.inspection.figures import draw_all, write_tensorboard
from buddy.inspection.routing import Domain, Inspection, Measures, as_json, changed_layers, observe, read_domains, typed
from buddy.io import check_output_path, on_disk, within_memory, write_json, writing
from buddy.router import available_budgets
from buddy.run import Run, read_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FOLDER, NUMBERS = "routing", "routing.json"  # in a run folder; in that folder
WINDOWS = 16
OWN = re.compile(rf"{re.escape(NUMBERS)}|(tokens|domains)-\d+(\.\d+)?(layers|ms)?\.png")  # files that a call leaves
USUAL = 0.75  # the budget nearest to this one is printed token by token, where none is asked for


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
    """Look at the plans of a run: print tables, draw pictures, write the numbers.

    Args:
        folder: the run.
        budgets: asked instead of the recipe's.
        domains: texts as "SOURCE,label=SOURCE,…" instead of the recipe's test text.
        text: a text to be looked at alone, token by token, instead of any domain.
        windows: of each domain at most so many; 16 by default.
        out: the folder for all that is written, instead of `routing` in the run folder for the pictures and numbers,
            and the run folder itself for TensorBoard.
        json_file: where the numbers go instead.

    Raises:
        BuddyError: the run, a budget, a text or a place cannot be used.
    """
    run = read_run(folder)
    place = out or run.folder / FOLDER
    _check(place, json_file, text, domains, windows)
    sources = None if text is not None else sources_of(domains, run.recipe.data.source)
    with status(f"Loading {run.backbone} …"):
        routed = load_model(run)
    asked = _asked(run, routed, budgets)
    if sources is None:
        looked_at = [typed(routed, text)]
    else:
        with status("Reading text …"):
            looked_at = read_domains(run, routed, sources, windows or WINDOWS)
    inspection = _look(run, routed, looked_at, asked)
    show(inspection)
    if text is not None:
        show_tokens(inspection, _usual(inspection))
    _write(inspection, place, out or run.folder, json_file or place / NUMBERS)


def _check(place: Path, json_file: Path | None, text: str | None, domains: str | None, windows: int | None) -> None:
    """Before the model is loaded: mistakes in what was asked for."""
    if text is not None and (domains is not None or windows is not None):
        raise DataError("--text looks at that text alone; leave out --domains and --windows, or --text.")
    if text is not None and not text.strip():
        raise DataError("The text to look at is empty; give some words.")
    if place.exists() and not place.is_dir():
        raise RunError(f"{place} is a file; name a folder for the pictures.")
    if not place.absolute().parent.is_dir():
        raise RunError(f"There is no folder {place.absolute().parent} for {place.name}; make it first.")
    if json_file:
        check_output_path(json_file)


def _asked(run: Run, routed: RoutedLM, budgets: Sequence[str] | None) -> dict[str, int]:
    """Budget as it is shown → K, deepest first, each checked against the model."""
    found = {}
    for budget in available_budgets(routed.router, run.recipe.budgets) if budgets is None else budgets:
        count = routed.executed_layers(budget)
        found[shown(budget)] = count
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _look(run: Run, routed: RoutedLM, domains: Sequence[Domain], asked: dict[str, int]) -> Inspection:
    batch, tokens = run.recipe.data.batch_size, domains[0].windows.input_ids.shape[1]
    sizes, advice = f"a batch of {batch} × {tokens} tokens", "free some, or use a machine with more"
    with within_memory(sizes, advice):
        routings = observe(
            routed, domains, asked.values(), batch_size=batch, track=tracker(f"Routing {run.router_name}")
        )
    words = labels_of(routed.backbone.tokenizer, domains[0].windows.input_ids[0].tolist())
    return Inspection(run.router_name, routed.geometry, asked, domains, routings, words)


def _usual(inspection: Inspection) -> str:
    """The asked budget nearest to `USUAL`."""
    layers = inspection.geometry.layers
    return min(inspection.asked, key=lambda budget: abs(inspection.asked[budget] / layers - USUAL))


def _remove_older(place: Path) -> None:
    """What an earlier call left: it may have been asked for other budgets or texts."""
    for path in list(place.iterdir()):
        if OWN.fullmatch(path.name) and path.is_file():
            path.unlink()


def _write(inspection: Inspection, place: Path, board: Path, numbers: Path) -> None:
    with status("Drawing …"), writing(place), on_disk(place):
        place.mkdir(exist_ok=True)
        _remove_older(place)
        drawn = draw_all(inspection, place)
        write_tensorboard(inspection, drawn, board)
    write_json(numbers, as_json(inspection))
    for line in (
        f"Pictures:    {', '.join(path.name for path in drawn.values())} in {place}",
        f"JSON:        {numbers}",
        f"TensorBoard: tensorboard --logdir {board}",
    ):
        results.print(line, soft_wrap=True)


LONGEST = 14  # signs
SPELT = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def labels_of(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """One short label for each token: its text without blanks around it, or the blanks spelt out where it is no more.

    Line ends and other invisible signs are spelt out; long tokens are cut.
    """
    return [_label(tokenizer.decode([token]) or tokenizer.convert_ids_to_tokens(token)) for token in ids]


def _label(text: str) -> str:
    label = "".join(map(_visible, text.strip(" ") or text))
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"


def _visible(sign: str) -> str:
    if sign in SPELT:
        return SPELT[sign]
    return sign if sign.isprintable() else f"\\{ord(sign):x}"


def show(inspection: Inspection) -> None:
    """Print the numbers and, as a line of signs for each text at each budget, how many tokens ran each layer."""
    table = Table(title=f"Plans of {inspection.router}, by budget and text")
    span = f"in {_span(inspection)} tokens"
    table.add_column("budget\n(layers)", no_wrap=True)
    table.add_column("text")
    for heading in ("plan changes", "layers apart", "plans", span, "most frequent", "off it"):
        table.add_column(heading, justify="right")
    shares = Table(title=f"Share of tokens that ran each layer, 0 to {inspection.geometry.layers - 1}")
    for heading in ("budget (layers)", "text", "▁ few … █ all, · none"):
        shares.add_column(heading)
    for budget, count in inspection.asked.items():
        for label, found in inspection.measures[count].items():
            asked = f"{budget} ({_executed(found)})"
            table.add_row(asked, label, *_cells(found))
            shares.add_row(asked, label, share_line(found.share))
    results.print(table)
    results.print(_explained(inspection))
    results.print(shares)


def show_tokens(inspection: Inspection, budget: str) -> None:
    """Print the first text token by token at one budget."""
    count, layers = inspection.asked[budget], inspection.geometry.layers
    routing = inspection.routings[inspection.domains[0].label, count]
    results.print(f"\nBudget {budget}: {count} of {layers} layers. {legend(layers)}", soft_wrap=True)
    for line in token_lines(routing.runs[0], inspection.words, sinks=routing.sinks, always=inspection.always):
        results.print(line, soft_wrap=True)


def _executed(found: Measures) -> str:
    """The layers that tokens ran: one number, as long as plans are exact."""
    least, _, most = found.executed
    return str(least) if least == most else f"{least} to {most}"


def _cells(found: Measures) -> list[str]:
    return [
        "–" if found.changes is None else _percent(found.changes),
        "–" if found.apart is None else f"{found.apart:.2f}",
        str(found.plans),
        f"{found.distinct:.1f}",
        _percent(found.commonest),
        _percent(found.off_commonest),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _span(inspection: Inspection) -> int:
    """Tokens of a stretch in which distinct plans are counted; the texts share it, for their windows are alike."""
    count = next(iter(inspection.asked.values()))
    return next(iter(inspection.measures[count].values())).span


def _explained(inspection: Inspection) -> str:
    sinks = next(iter(inspection.routings.values())).sinks
    counted = "; ".join(_size(domain, sinks) for domain in inspection.domains)
    left_out = f"; sink tokens, run at full depth and left out: {sinks} a window" if sinks else ""
    return (
        "Plan changes: tokens whose plan is not that of the token before; layers apart: in how many layers these two "
        f"differ, on average. Plans: distinct ones, in all and in {_span(inspection)} tokens. Most frequent: tokens "
        "with the text's most frequent plan; off it: chosen layers that the most frequent plan of all texts does not "
        "run.\n"
        f"{counted}{left_out}."
    )


def _size(domain: Domain, sinks: int) -> str:
    windows = len(domain.windows)
    tokens = _counted(domain.windows.input_ids.numel() - sinks * windows, "token")
    documents = _counted(len(domain.windows.documents.unique()), "document")
    return f"{domain.label}: {tokens} in {_counted(windows, 'window')} of {documents}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


CHOSEN, ALWAYS, SKIPPED = "█", "▒", "·"
HEIGHTS = "▁▂▃▄▅▆▇█"


def token_lines(runs: np.ndarray, labels: Sequence[str], *, sinks: int, always: tuple[int, int]) -> Iterable[Text]:
    """A head and a line for each token: its label, a sign for each layer, and the layers changed since the last token.

    Args:
        runs: (T, L) bool.
        labels: a short word for each token.
        sinks: first tokens at full depth whatever the budget.
        always: how many layers always run at the beginning and at the end.
    """
    width = max(map(cell_len, labels), default=0)
    yield Text(" " * width + "  " + _ruler(runs.shape[1]), style="dim")
    changes = changed_layers(runs, sinks)
    for token, (label, ran) in enumerate(zip(labels, runs, strict=True)):
        line = Text(set_cell_size(label, width) + "  ")
        _add_layers(line, ran, always, token < sinks)
        if token < sinks:
            line.append("  sink", style="dim")
        elif changes[token]:
            line.append(f"  {changes[token]} changed", style="dim")
        yield line


def share_line(share: Sequence[float]) -> Text:
    """One sign for each layer, as high as its share of tokens; a dot for a layer that nobody ran."""
    signs = (HEIGHTS[min(7, int(part * 8))] if part > 0 else SKIPPED for part in share)
    return Text("".join(signs))


def legend(layers: int) -> str:
    """What the signs of `token_lines` mean."""
    return f"Layers 0 to {layers - 1} from left to right: {CHOSEN} ran, chosen  {ALWAYS} always runs  {SKIPPED} skipped"


def _add_layers(line: Text, ran: np.ndarray, always: tuple[int, int], sink: bool) -> None:
    first, last = always
    for layer, runs in enumerate(ran):
        if not runs:
            line.append(SKIPPED, style="dim")
        elif layer < first or layer >= len(ran) - last:
            line.append(ALWAYS, style="dim")
        else:
            line.append(CHOSEN, style="yellow" if sink else "blue")


def _ruler(layers: int) -> str:
    """The numbers of every fifth layer over their places."""
    ruler = ""
    for layer in range(0, layers, 5):
        ruler = ruler.ljust(layer) + str(layer)
    return ruler
