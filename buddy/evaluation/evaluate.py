"""`buddy evaluate`: a finished run on its own held-out text or on another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from buddy import console, distributed
from buddy.backbone.load import title_of
from buddy.backbone.sharding import join
from buddy.budget import auto_of, fraction_of, latency_of
from buddy.build import build_held_out, build_windows, load_model
from buddy.console import results, status
from buddy.data.module import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import BudgetError, DataError
from buddy.evaluation.tables import show_scores
from buddy.io import check_output_path, within_memory, write_json
from buddy.router import available_budgets
from buddy.run import Run, read_run
from buddy.scoring.perplexity import Scores, as_json
from buddy.training.module import evaluate


def evaluate_run(
    folder: Path,
    *,
    json_file: Path | None = None,
    budgets: Sequence[str] | None = None,
    data: str | None = None,
    split: str = "test",
    devices: int = 1,
) -> None:
    """Evaluate a run and print the table, by as many processes as there are devices; the first of them speaks.

    Args:
        folder: the run.
        json_file: where the results go as JSON, if anywhere.
        budgets: asked instead of the recipe's.
        data: a text instead of the recipe's.
        split: "test" or "validation" of the recipe's text.
        devices: of this machine that share the windows; torchrun's number of processes holds where it began them.

    Raises:
        BuddyError: the run, a budget or the text cannot be used.
    """
    console.errors.quiet = console.results.quiet = not distributed.is_global_zero()
    run = _spread(read_run(folder), devices)
    if json_file and distributed.is_global_zero():
        check_output_path(json_file, *([Path(data)] if data else []))
    if data is not None and not data.strip():
        raise DataError("The text to evaluate on has no name; name one, or leave --data out.")
    _refuse_times(budgets, math.prod(distributed.device_counts(run.recipe.trainer)))
    join(run.recipe.trainer)
    with status(f"Loading {run.backbone} …"):
        routed = load_model(run)
    asked = _asked(routed, run, budgets)
    with status("Reading text …"), distributed.rank_zero_first():
        windows = windows_for(run, routed, data, split)
    sizes = f"a batch of {run.recipe.data.batch_size} × {windows.input_ids.shape[1]} tokens"
    with within_memory(sizes, "free some, or use a machine with more"), distributed.lost_peers_reported():
        scores = _scores(run, routed, windows, asked)
    if not distributed.is_global_zero():
        return
    show_scores(
        scores, f"{run.router_name} on {data or run.recipe.data.source}, backbone {title_of(routed.backbone.name)}"
    )
    if json_file:
        write_json(json_file, as_json(scores))
        results.print(f"JSON: {json_file}", soft_wrap=True)


def _spread(run: Run, devices: int) -> Run:
    """The run on so many devices of this machine, whatever it was made on."""
    trainer = {**run.recipe.trainer, "devices": devices, "num_nodes": 1}
    return replace(run, recipe=replace(run.recipe, trainer=trainer))


def _refuse_times(budgets: Sequence[str] | None, devices: int) -> None:
    for budget in budgets or () if devices > 1 else ():
        if latency_of(budget) is not None:
            raise BudgetError(
                f"{budget} is a time on one device, and {devices} disturb one another; ask for it without --devices, "
                "or for a fraction such as 0.75."
            )


def _scores(run: Run, routed: RoutedLM, windows: Windows, asked: Sequence[float | str]) -> list[Scores]:
    return evaluate(
        routed,
        windows,
        asked,
        prompt=run.recipe.data.prompt,
        batch_size=run.recipe.data.batch_size,
        description=f"Evaluating {run.router_name}",
    )


def _asked(routed: RoutedLM, run: Run, budgets: Sequence[str] | None) -> list[float | str]:
    """Budgets as fractions, "auto" as it is; each checked against the model."""
    if budgets is None:
        return list(available_budgets(routed.router, run.recipe.budgets))
    found: list[float | str] = []
    for budget in budgets:
        if auto_of(budget):
            routed.choosing(budget)
            found.append(budget)
        else:
            found.append(fraction_of(budget, routed.executed_layers(budget), routed.geometry.layers))
    return found


def windows_for(run: Run, routed: RoutedLM, data: str | None, split: str) -> Windows:
    """The windows of a split of the run's text, or of another text as many as it has for its test."""
    if data is None:
        return getattr(build_held_out(run.recipe, routed.backbone), split)
    return build_windows(run.recipe, routed.backbone.tokenizer, data, count=run.recipe.data.test_windows)
