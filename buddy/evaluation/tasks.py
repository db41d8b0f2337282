"""`buddy evaluate --tasks`: lm-eval's tasks under a finished run, at every budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from buddy.backbone.load import title_of
from buddy.budget import auto_cap, fraction_of
from buddy.builders.model import load_model
from buddy.console import NONE, Bar, print_titled_table, report_json, status
from buddy.engine.model import RoutedLM
from buddy.errors import BudgetError, DataError, reason
from buddy.evaluation.evaluate import router_title
from buddy.evaluation.task_data import FEWSHOT_SEED, load_tasks, quiet_lm_eval, require_lm_eval
from buddy.io import check_output_path, within_memory
from buddy.metrics.statistics import flips
from buddy.router import available_budgets
from buddy.run import read_run

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
        budgets: instead of the recipe's.
        limit: the first so many items of each task.
        task_data: a folder with NAME.jsonl for each task, instead of the hub's data sets.
        task_path: a folder of further task definitions (YAML).
        json_file: where the results go as JSON, if anywhere.

    Raises:
        BuddyError: the run, a budget or a task cannot be used, or lm-eval is not installed.
    """
    run = read_run(folder)
    if json_file:
        check_output_path(json_file, *run.inputs, *filter(None, [task_data, task_path]))
    found = task_scores(folder, tasks, budgets, limit, task_data, task_path)
    report_json(json_file, found)
    show_tasks(
        found["results"],
        f"{router_title(run, found['mean_over'])} on tasks, backbone {title_of(run.backbone)}",
        run.recipe.routing.sink_tokens,
        run.geometry["layers"],
    )


def task_scores(
    folder: Path,
    names: Sequence[str],
    budgets: Sequence[float | str] | None = None,
    limit: int | None = None,
    task_data: Path | None = None,
    task_path: Path | None = None,
    routed: RoutedLM | None = None,
) -> dict[str, Any]:
    """A run's scores on tasks.

    The arguments are those of `evaluate_tasks`; `names` are its tasks, `routed` is the run's model where it is loaded.

    Returns:
        {"results": [one entry for each task and budget], "mean_over": as in `RoutedLM`}. An entry has "task", "budget",
        "layers" (K), "executed" ("min", "mean", "max" layers that tokens ran, sinks and padding left out, None where
        nothing else is left), "metric" (acc_norm where the task has it, else acc, else its first one), "value" and
        "stderr" (as lm-eval computes them; None for one item), "items", and "correct": 0 or 1 for each item in order,
        None where the metric is no count of right answers.

    Raises:
        BuddyError: the run, a budget or a task cannot be used, or lm-eval is not installed.
    """
    run = read_run(folder)
    require_lm_eval()
    if limit is not None and limit < 1:
        raise DataError(f"The limit is {limit}; give 1 or more items for each task, or none.")
    if any(map(auto_cap, budgets or ())):
        raise BudgetError("Tasks are scored at fixed budgets, not at auto; give fractions such as 0.75.")
    with quiet_lm_eval():
        with status("Reading tasks …"):
            tasks = load_tasks(names, task_data, task_path)
            for name, task in tasks.items():
                with _refusals_reported(name):
                    task.build_all_requests(limit=limit)
        if routed is None:
            with status(f"Loading {run.backbone} …"):
                routed = load_model(run)
        wanted = available_budgets(routed.router, run.recipe.budgets) if budgets is None else budgets
        layers = routed.geometry.layers
        fractions = {fraction_of(each, routed.executed_layers(each), layers): each for each in wanted}
        from buddy.evaluation.harness import BuddyLM

        data = run.recipe.data
        tokens = data.batch_size * data.window
        model = BuddyLM(routed, wanted[0], batch_tokens=tokens)
        with within_memory(f"a batch of {tokens} tokens"):
            return {"results": _over_budgets(model, tasks, fractions, limit), "mean_over": routed.mean_over}


def _over_budgets(
    model: BuddyLM, tasks: dict[str, Task], budgets: dict[float, float | str], limit: int | None
) -> list[dict[str, Any]]:
    """An entry of the results for each task and budget."""
    found, done, note = [], 0, ""
    with Bar("Scoring tasks", sum(len(task.instances) for task in tasks.values()) * len(budgets)) as bar:

        def on_scored(count: int) -> None:
            nonlocal done
            done += count
            bar.update(done, note)

        model.on_scored = on_scored
        for name, task in tasks.items():
            for fraction, budget in budgets.items():
                end, note = done + len(task.instances), f"{name} at {budget}"
                model.set_budget(budget)
                found.append(_entry(model, name, task, fraction, limit))
                on_scored(end - done)  # generated answers are not counted one by one
    return found


def _entry(model: BuddyLM, name: str, task: Task, budget: float, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    task.set_fewshot_seed(FEWSHOT_SEED)  # otherwise each budget gets other examples
    with _refusals_reported(name):
        outcome = evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=BOOTSTRAPS)
        values = outcome["results"][name]
        metric, filtered = _metric(values)
        value = float(values[f"{metric},{filtered}"])
    samples = [sample[metric] for sample in outcome["samples"][name] if sample["filter"] == filtered]
    stderr, ran = values.get(f"{metric}_stderr,{filtered}"), model.executed.tolist()
    executed = (min(ran), sum(ran) / len(ran), max(ran)) if ran else (None, None, None)
    return {
        "task": name,
        "budget": budget,
        "layers": model.layers,
        "executed": dict(zip(("min", "mean", "max"), executed, strict=True)),
        "metric": metric,
        "value": value,
        "stderr": float(stderr) if isinstance(stderr, float) else None,
        "items": len(samples),
        "correct": [int(sample) for sample in samples] if all(sample in (0, 1) for sample in samples) else None,
    }


@contextmanager
def _refusals_reported(name: str) -> Iterator[None]:
    """Turn errors that a task's definition or items cause within this block into DataErrors."""
    from jinja2 import TemplateError

    try:
        yield
    except (ValueError, AssertionError, TypeError, AttributeError, LookupError, TemplateError) as error:
        raise DataError(
            f"{name} cannot be scored ({reason(error)}); correct its definition or its items, or leave it out."
        ) from error


def _metric(values: dict[str, Any]) -> tuple[str, str]:
    """The metric to report and the filter of the answers that it is for."""
    pairs = [key.split(",", 1) for key in values if "," in key]
    metrics = {metric: filtered for metric, filtered in reversed(pairs) if not metric.endswith("_stderr")}
    metric = next((name for name in ("acc_norm", "acc") if name in metrics), None) or list(metrics)[-1]
    return metric, metrics[metric]


def show_tasks(entries: Sequence[Mapping[str, Any]], title: str, sinks: int, depth: int) -> None:
    """Print the scores of one router on tasks, a row for each task and a column for each budget.

    Args:
        entries: as `task_scores` gives them.
        title: over the table.
        sinks: tokens of each sequence at full depth whatever the budget.
        depth: layers of the backbone.
    """
    budgets = {entry["budget"]: entry["layers"] for entry in entries}
    tasks = {entry["task"]: entry for entry in entries}
    by_key = {(entry["task"], entry["budget"]): entry for entry in entries}
    shares = [name for name in tasks if all(e["correct"] is not None for e in entries if e["task"] == name)]
    rows = [
        [name, about["metric"], str(about["items"])]
        + [_score(by_key[name, budget], share=name in shares) for budget in budgets]
        for name, about in tasks.items()
    ]
    if len(shares) > 1:
        means = (mean(by_key[name, budget]["value"] for name in shares) for budget in budgets)
        rows.append(["average", "", "", *(f"{100 * value:.1f}" for value in means)])
    full = next((budget for budget, layers in budgets.items() if layers == depth), None)
    known = [name for name in shares if all((name, budget) in by_key for budget in (full, *budgets))]
    if known and len(budgets) > 1:

        def share(budget: float) -> float:
            pairs = ((by_key[name, full]["correct"], by_key[name, budget]["correct"]) for name in known)
            return mean(mean(flips(*pair).tolist()) for pair in pairs)

        cells = (NONE if layers == depth else f"{100 * share(budget):.1f}" for budget, layers in budgets.items())
        rows.append(["flips", "against full depth", "", *cells])
    rows.append(["layers run", "min / mean / max", "", *(_ran(entries, budget) for budget in budgets)])
    head = ["task", "metric", "items", *(f"{budget:g} ({layers})" for budget, layers in budgets.items())]
    note = f"Sink tokens, run at full depth and counted apart: {sinks} a sequence." if sinks else ""
    print_titled_table(f"{title}: % right ± standard error, by budget (executed layers)", head, rows, note)


def _score(entry: Mapping[str, Any], share: bool) -> str:
    if not share:  # of right answers
        return f"{entry['value']:.4g}"
    error = "" if entry["stderr"] is None else f" ± {100 * entry['stderr']:.1f}"
    return f"{100 * entry['value']:.1f}{error}"


def _ran(entries: Sequence[Mapping[str, Any]], budget: float) -> str:
    """Layers that tokens ran, over all tasks at a budget that have routed tokens; the mean is the tasks' mean."""
    ran = [entry["executed"] for entry in entries if entry["budget"] == budget and entry["executed"]["min"] is not None]
    if not ran:
        return NONE
    least, most = min(each["min"] for each in ran), max(each["max"] for each in ran)
    return f"{least} / {sum(each['mean'] for each in ran) / len(ran):.2f} / {most}"
