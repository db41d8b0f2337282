"""`buddy evaluate --tasks`: lm-eval's tasks under a finished run, at every budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.budget import auto_of, fraction_of
from buddy.build import load_model
from buddy.console import Bar, results, status
from buddy.errors import BudgetError, DataError
from buddy.evaluation.task_source import FEWSHOT_SEED, hushed, load_tasks, reason_of, require_lm_eval
from buddy.evaluation.task_table import show_tasks
from buddy.io import check_output_path, within_memory, write_json
from buddy.router import available_budgets
from buddy.run import Run, read_run

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from buddy.evaluation.harness import BuddyLM

BOOTSTRAPS = 1000  # for the standard errors that have no formula; accuracies have one


def evaluate_tasks(
    folder: Path,
    *,
    tasks: Sequence[str],
    budgets: Sequence[str] | None = None,
    limit: int | None = None,
    task_data: Path | None = None,
    task_path: Path | None = None,
    json_file: Path | None = None,
) -> None:
    """Score a run on tasks and print the table.

    Args:
        folder: the run.
        tasks: names that lm-eval knows: tasks, groups or tags.
        budgets: asked instead of the recipe's.
        limit: the first so many items of each task.
        task_data: a folder with NAME.jsonl for each task, instead of the hub's data sets.
        task_path: a folder of task definitions (YAML) of one's own, beside lm-eval's.
        json_file: where the results go as JSON, if anywhere.

    Raises:
        BuddyError: the run, a budget or a task cannot be used, or lm-eval is not installed.
    """
    if json_file:
        check_output_path(json_file)
    run = read_run(folder)
    found = _scored(run, tasks, budgets, limit, task_data, task_path)
    show_tasks(found["results"], f"{run.router_name} on tasks", run.recipe.routing.sink_tokens)
    if json_file:
        write_json(json_file, found)
        results.print(f"JSON: {json_file}", soft_wrap=True)


def task_scores(
    run_folder: Path,
    tasks: Sequence[str],
    budgets: Sequence[float | str] | None = None,
    limit: int | None = None,
    task_data: Path | None = None,
    task_path: Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """What a run scores on tasks; no table is printed.

    The arguments are those of `evaluate_tasks`.

    Returns:
        {"results": [one entry for each task and budget]}. An entry has "task", "budget", "layers" (K), "executed"
        ("min", "mean", "max" layers that tokens ran, sinks and padding left out, None where nothing else is left),
        "metric" (acc_norm where the task has it, else acc, else its first one), "value" and "stderr" (as lm-eval
        computes them; None for one item), "items", and "correct": 0 or 1 for each item in order, None where the metric
        is no count of right answers.

    Raises:
        BuddyError: the run, a budget or a task cannot be used, or lm-eval is not installed.
    """
    return _scored(read_run(run_folder), tasks, budgets, limit, task_data, task_path)


def _scored(
    run: Run,
    names: Sequence[str],
    budgets: Sequence[float | str] | None,
    limit: int | None,
    task_data: Path | None,
    task_path: Path | None,
) -> dict[str, list[dict[str, Any]]]:
    require_lm_eval()
    if limit is not None and limit < 1:
        raise DataError(f"The limit is {limit}; give 1 or more items for each task, or none.")
    if any(map(auto_of, budgets or ())):
        raise BudgetError("Tasks are scored at fixed budgets, not at auto; ask for fractions such as 0.75.")
    with hushed():
        with status("Reading tasks …"):
            tasks = load_tasks(names, task_data, task_path)
            for name, task in tasks.items():
                with _refusals_told(name):
                    task.build_all_requests(limit=limit)
        with status(f"Loading {run.backbone} …"):
            routed = load_model(run)
        asked = available_budgets(routed.router, run.recipe.budgets) if budgets is None else budgets
        layers = routed.geometry.layers
        fractions = {fraction_of(each, routed.executed_layers(each), layers): each for each in asked}
        from buddy.evaluation.harness import BuddyLM

        data = run.recipe.data
        tokens = data.batch_size * data.window
        model = BuddyLM(routed, asked[0], batch_tokens=tokens)
        with within_memory(f"a batch of {tokens} tokens", "free some, or use a machine with more"):
            return {"results": _over_budgets(model, tasks, fractions, limit)}


def _over_budgets(
    model: BuddyLM, tasks: dict[str, Task], budgets: dict[float, float | str], limit: int | None
) -> list[dict[str, Any]]:
    found = []
    total, done = len(budgets) * sum(len(task.instances) for task in tasks.values()), 0
    with Bar("Scoring tasks", total) as bar:
        for name, task in tasks.items():
            for fraction, budget in budgets.items():
                note, start = f"{name} at {budget}", done

                def on_scored(count: int, note: str = note) -> None:
                    nonlocal done
                    done += count
                    bar.update(done, note)

                model.ask(budget)
                model.on_scored = on_scored
                found.append(_entry(model, name, task, fraction, limit))
                done = start + len(task.instances)  # generated answers are not counted one by one
                bar.update(done, note)
    return found


def _entry(model: BuddyLM, name: str, task: Task, budget: float, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    task.set_fewshot_seed(FEWSHOT_SEED)  # else its sampler draws on, and each budget gets other examples
    with _refusals_told(name):
        outcome = evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=BOOTSTRAPS)
    values = outcome["results"][name]
    metric, filtered = _metric(values)
    samples = [sample[metric] for sample in outcome["samples"][name] if sample["filter"] == filtered]
    stderr, executed = values.get(f"{metric}_stderr,{filtered}"), model.executed
    return {
        "task": name,
        "budget": budget,
        "layers": model.layers,
        "executed": {"min": executed.least, "mean": executed.mean, "max": executed.most},
        "metric": metric,
        "value": float(values[f"{metric},{filtered}"]),
        "stderr": float(stderr) if isinstance(stderr, float) else None,
        "items": len(samples),
        "correct": [int(sample) for sample in samples] if all(sample in (0, 1) for sample in samples) else None,
    }


@contextmanager
def _refusals_told(name: str) -> Iterator[None]:
    """What lm-eval refuses within this block, by ValueError or an assertion, becomes a DataError."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{name} cannot be scored ({reason_of(error)}); mend its definition or its items, or leave it out."
        ) from error


def _metric(values: dict[str, Any]) -> tuple[str, str]:
    """The metric to report and the filter of the answers that it is for."""
    pairs = [key.split(",", 1) for key in values if "," in key]
    metrics = {metric: filtered for metric, filtered in reversed(pairs) if not metric.endswith("_stderr")}
    metric = next((name for name in ("acc_norm", "acc") if name in metrics), None) or list(metrics)[-1]
    return metric, metrics[metric]
