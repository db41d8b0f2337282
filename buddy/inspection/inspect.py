"""`buddy inspect`: which layers a finished run spends on which token, as numbers and pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from buddy.budget import shown
from buddy.build import load_model
from buddy.console import results, status, tracker
from buddy.engine.model import RoutedLM
from buddy.errors import DataError, RunError
from buddy.inspection.domains import Domain, read_domains, sources_of, typed
from buddy.inspection.labels import labels_of
from buddy.inspection.observe import observe
from buddy.inspection.pictures import draw_all, write_tensorboard
from buddy.inspection.report import show, show_tokens
from buddy.inspection.result import Inspection, as_json
from buddy.io import check_place, on_disk, within_memory, write_json, writing
from buddy.router import available_budgets
from buddy.run import Run, read_run

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
    place = out or folder / FOLDER
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
    _write(inspection, place, out or folder, json_file or place / NUMBERS)


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
        check_place(json_file)


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
