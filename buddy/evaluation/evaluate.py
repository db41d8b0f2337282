"""`buddy evaluate`: a finished run on its own held-out text or on another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer

from buddy import console, distributed
from buddy.backbone.load import title_of
from buddy.backbone.sharding import join
from buddy.budget import auto_cap, fraction_of, latency_of
from buddy.build import build_held_out, build_windows, load_model
from buddy.console import quiet, results, status
from buddy.data.module import WindowBatches
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import BudgetError, DataError
from buddy.evaluation.tables import show_scores
from buddy.io import check_output_path, within_memory, write_json
from buddy.metrics.perplexity import Reference, Scores, as_json
from buddy.router import available_budgets
from buddy.run import Run, read_run
from buddy.training.callbacks import ProgressLine
from buddy.training.module import RoutingModule


def evaluate_run(
    folder: Path,
    *,
    json_file: Path | None = None,
    budgets: Sequence[str] | None = None,
    data: str | None = None,
    split: str = "test",
    devices: int = 1,
) -> None:
    """Evaluate a run with a process for each device; the first process prints the table.

    Args:
        folder: the run.
        json_file: where the results go as JSON, if anywhere.
        budgets: instead of the recipe's.
        data: a text instead of the recipe's.
        split: "test" or "validation" of the recipe's text.
        devices: of this machine that share the windows; under torchrun its number of processes.

    Raises:
        BuddyError: the run, a budget or the text cannot be used.
    """
    console.errors.quiet = console.results.quiet = not distributed.is_global_zero()
    run = read_run(folder)
    trainer = {**run.recipe.trainer, "devices": devices, "num_nodes": 1}  # not those that the run was made on
    run = replace(run, recipe=replace(run.recipe, trainer=trainer))
    section = run.recipe.data
    if json_file and distributed.is_global_zero():
        check_output_path(json_file, *([Path(data)] if data else []))
    if data is not None and not data.strip():
        raise DataError("The text to evaluate on has no name; name one, or leave --data out.")
    processes = math.prod(distributed.device_counts(run.recipe.trainer))
    if latencies := [budget for budget in budgets or () if processes > 1 and latency_of(budget) is not None]:
        raise BudgetError(
            f"{latencies[0]} is a time on one device, and {processes} devices slow one another down; leave out "
            "--devices, or ask for a fraction such as 0.75."
        )
    join(run.recipe.trainer)
    with status(f"Loading {run.backbone} …"):
        routed = load_model(run)
    checked = _checked_budgets(routed, run, budgets)
    with status("Reading text …"), distributed.rank_zero_first():
        windows = windows_for(run, routed, data, split)
    sizes = f"a batch of {section.batch_size} × {windows.input_ids.shape[1]} tokens"
    with within_memory(sizes, "free some, or use a machine with more"), distributed.lost_peers_reported():
        scores = evaluate(
            routed,
            windows,
            checked,
            prompt=section.prompt,
            batch_size=section.batch_size,
            description=f"Evaluating {run.router_name}",
        )
    if not distributed.is_global_zero():
        return
    show_scores(scores, f"{run.router_name} on {data or section.source}, backbone {title_of(routed.backbone.name)}")
    if json_file:
        write_json(json_file, as_json(scores))
        results.print(f"JSON: {json_file}", soft_wrap=True)


def _checked_budgets(routed: RoutedLM, run: Run, budgets: Sequence[str] | None) -> list[float | str]:
    """Budgets as fractions, "auto" unchanged; each checked against the model."""
    if budgets is None:
        return list(available_budgets(routed.router, run.recipe.budgets))
    found: list[float | str] = []
    for budget in budgets:
        if auto_cap(budget):
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


def evaluate(
    model: RoutedLM,
    windows: Windows,
    budgets: Sequence[float | str],
    *,
    prompt: int,
    batch_size: int = 4,
    reference: Reference | None = None,
    description: str | None = None,
) -> list[Scores]:
    """Scores of the model's router at each budget, by `Trainer.test`.

    Processes that are together share the batches out and all get all scores: bit-identical to those of one process
    with the same batches, because sums are taken in the order of the windows.

    Args:
        model: model and router, the same in all processes.
        windows: held-out text.
        budgets: fractions, each of which becomes K layers; or "auto", which chooses K for each window from its prompt.
        prompt: tokens of each window that are not scored.
        batch_size: windows per forward.
        reference: keeps what all routers share, where several are evaluated on the same windows in the same way.
        description: of the progress line; None shows none.

    Raises:
        BudgetError: a budget out of range, or "auto" without a budget predictor.
    """
    module = RoutingModule(model, budgets=budgets, prompt=prompt, reference=reference)
    device = model.backbone.device
    with quiet():
        trainer = Trainer(
            accelerator=device.type,
            devices=[device.index] if device.index is not None else 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=description is not None,
            enable_model_summary=False,
            inference_mode=False,
            callbacks=[] if description is None else [ProgressLine(description)],
        )
        trainer.test(module, WindowBatches(windows, batch_size), verbose=False)
    return module.scores
