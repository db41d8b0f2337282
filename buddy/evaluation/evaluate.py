"""`buddy evaluate`: a finished run on its own held-out text or on another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import Trainer

from buddy import console, distributed
from buddy.backbone.load import title_of
from buddy.backbone.sharding import join
from buddy.budget import auto_cap, format_budget, fraction_of, latency_of
from buddy.builders.data import build_unseen, held_out
from buddy.builders.model import check_mean, load_model
from buddy.console import counted, print_titled_table, quality_cells, quiet, report_json, status, stdout
from buddy.data.module import WindowBatches
from buddy.data.text import same_source
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import BudgetError, DataError
from buddy.io import check_output_path, within_memory
from buddy.metrics.perplexity import Reference, Scores, as_json, keys_of
from buddy.metrics.statistics import mixed
from buddy.router import available_budgets
from buddy.run import Run, read_run
from buddy.training.callbacks import ProgressLine, interrupts
from buddy.training.module import BudgetModule


def evaluate_run(
    folder: Path,
    *,
    json_file: Path | None = None,
    budgets: Sequence[str] | None = None,
    data: str | None = None,
    split: str = "test",
    devices: int = 1,
    mean_over: int | None = None,
) -> None:
    """Evaluate a run with a process for each device; the first process prints the table.

    Args:
        folder: the run.
        json_file: where the results go as JSON, if anywhere.
        budgets: instead of the recipe's.
        data: a text instead of the recipe's.
        split: "test" or "validation" of the recipe's text.
        devices: of this machine that share the windows; under torchrun its number of processes.
        mean_over: tokens that run a budget's layers in the mean (see `RoutedLM`), instead of the recipe's.

    Raises:
        BuddyError: the run, a budget or the text cannot be used.
    """
    console.stderr.quiet = console.stdout.quiet = not distributed.is_global_zero()
    run = read_run(folder)
    trainer = {**run.recipe.trainer, "devices": devices, "num_nodes": 1}  # not those that the run was made on
    run = replace(run, recipe=replace(run.recipe, trainer=trainer))
    section = run.recipe.data
    if json_file and distributed.is_global_zero():
        check_output_path(json_file, *run.inputs, *filter(None, [data]))
    if data is not None and not data.strip():
        raise DataError("The text to evaluate on has no name; name one, or leave --data out.")
    processes = math.prod(distributed.device_counts(run.recipe.trainer))
    several = budgets if budgets and processes > 1 else ()
    if latencies := [budget for budget in several if latency_of(auto_cap(budget) or budget) is not None]:
        raise BudgetError(
            f"{latencies[0]} is a time on one device, and {processes} devices slow one another down; leave out "
            "--devices, or ask for a fraction such as 0.75."
        )
    join(run.recipe.trainer)
    with status(f"Loading {run.backbone} …"):
        routed = load_model(run)
    wanted: Sequence[float | str] = budgets or available_budgets(routed.router, run.recipe.budgets)
    keys, layers = keys_of(routed, wanted), routed.geometry.layers
    fractions = [b if auto_cap(b) else fraction_of(b, int(keys[b]), layers) for b in wanted]
    with status("Reading text …"), distributed.rank_zero_first():
        windows = windows_for(run, routed, data, split)
    sizes = f"a batch of {section.batch_size} × {windows.input_ids.shape[1]} tokens"
    memory = within_memory(sizes)
    over = run.recipe.routing.mean_over if mean_over is None else mean_over
    with memory, distributed.lost_peers_reported(), routed.changed(mean_over=over):
        check_mean(routed)
        over = routed.mean_over
        scores = evaluate(
            routed,
            windows,
            fractions,
            prompt=section.prompt,
            batch_size=section.batch_size,
            description=f"Evaluating {run.router_name}",
        )
    if not distributed.is_global_zero():
        return
    report_json(json_file, as_json(scores))
    names: dict[float | str, str] = {}
    for fraction, budget in zip(fractions, wanted, strict=True):  # equal budgets share a row
        names[fraction] = ", ".join(dict.fromkeys([*filter(None, [names.get(fraction)]), format_budget(budget)]))
    on = f"on {data or section.source}, backbone {title_of(routed.backbone.name)}"
    show_scores(scores, f"{router_title(run, over)} {on}", names)


def router_title(run: Run, mean_over: int) -> str:
    """The router as titles of tables name it."""
    return run.router_name if mean_over == 1 else f"{run.router_name}, budgets in the mean over {mean_over} tokens,"


def windows_for(run: Run, routed: RoutedLM, data: str | None, split: str) -> Windows:
    """The windows of a split of the run's text, or of another text as many as it has for its test.

    Raises:
        RunError: the run's text has changed (`held_out`).
        DataError: another text holds one that the run was fitted to.
    """
    section = run.recipe.data
    if data is None or same_source(data, section.source):
        return getattr(held_out(run, routed.backbone), split)
    return build_unseen(run, routed.backbone.tokenizer, data, count=section.test_windows)


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
    module = BudgetModule(model, budgets=budgets, prompt=prompt, lr=0.0, reference=reference)
    device = model.backbone.device
    with quiet():
        trainer = Trainer(
            accelerator=device.type,
            devices=[device.index] if device.index is not None else 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,
            callbacks=[] if description is None else [ProgressLine(description)],
        )
        with interrupts(trainer):
            trainer.test(module, WindowBatches(windows, batch_size), verbose=False)
    return module.scores


def show_scores(scores: Sequence[Scores], title: str, names: Mapping[float | str, str]) -> None:
    """Print the results of one router on one text, a row for each budget, by the name that it was given."""
    head = ["budget", "layers", "executed min / mean / max", "perplexity", "95 % interval", "KL to dense"]
    uneven = any(each.executed.min < each.executed.max for each in scores)
    head[3:3] = ["scored"] * uneven
    rows = []
    for each in scores:
        ran = each.executed
        layers = f"{each.layers}" if each.chosen is None else f"{ran.mean:.1f}"
        executed = [f"{ran.min} / {ran.mean:.2f} / {ran.max}", *[f"{ran.scored:.2f}"] * uneven]
        quality = quality_cells(each.perplexity, each.interval(), each.mean_kl)
        rows.append([names[each.budget], layers, *executed, *quality])
    note = f"{int(scores[0].tokens.sum())} scored tokens in {counted(len(scores[0].tokens), 'document')}"
    note += "; scored: layers that they ran in the mean, without prompts" * uneven
    if scores[0].sinks:
        note += f"; sink tokens, run at full depth and counted apart: {scores[0].sinks} a window"
    print_titled_table(title, head, rows, f"{note}.")
    for each in scores:
        if each.chosen is not None:
            stdout.print(_chosen(each, scores))


def _chosen(auto: Scores, scores: Sequence[Scores]) -> str:
    """The choices of a budget predictor, and the perplexity of a random mixture of two fixed budgets."""
    counts = ", ".join(f"{layers} layers for {windows}" for layers, windows in sorted(auto.chosen.items()))
    text = f"{auto.budget} chose, of {sum(auto.chosen.values())} windows, {counts}"
    fixed = {each.executed.mean: math.log(each.perplexity) for each in scores if each.chosen is None}
    loss = mixed(fixed, auto.executed.mean)
    if loss is not None:
        text += f"; a random mixture of fixed budgets with as many layers has perplexity {math.exp(loss):.2f}"
    return f"{text}."
