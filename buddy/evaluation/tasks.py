"""`buddy evaluate --tasks`: lm-eval's tasks under a finished run, at every budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.backbone.load import title_of
from buddy.budget import auto_cap, fraction_of
from buddy.build import load_model
from buddy.console import Bar, results, status
from buddy.data.text import quiet
from buddy.errors import BuddyError, BudgetError, DataError, nearest, reason
from buddy.evaluation.tables import show_tasks
from buddy.io import check_output_path, within_memory, write_json
from buddy.router import available_budgets
from buddy.run import read_run

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

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
    if json_file:
        check_output_path(json_file)
    found = task_scores(folder, tasks, budgets, limit, task_data, task_path)
    run = read_run(folder)
    show_tasks(
        found["results"],
        f"{run.router_name} on tasks, backbone {title_of(run.backbone)}",
        run.recipe.routing.sink_tokens,
    )
    if json_file:
        write_json(json_file, found)
        results.print(f"JSON: {json_file}", soft_wrap=True)


def task_scores(
    folder: Path,
    names: Sequence[str],
    budgets: Sequence[float | str] | None = None,
    limit: int | None = None,
    task_data: Path | None = None,
    task_path: Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """A run's scores on tasks.

    The arguments are those of `evaluate_tasks`; `names` are its tasks.

    Returns:
        {"results": [one entry for each task and budget]}. An entry has "task", "budget", "layers" (K), "executed"
        ("min", "mean", "max" layers that tokens ran, sinks and padding left out, None where nothing else is left),
        "metric" (acc_norm where the task has it, else acc, else its first one), "value" and "stderr" (as lm-eval
        computes them; None for one item), "items", and "correct": 0 or 1 for each item in order, None where the metric
        is no count of right answers.

    Raises:
        BuddyError: the run, a budget or a task cannot be used, or lm-eval is not installed.
    """
    run = read_run(folder)
    require_lm_eval()
    if limit is not None and limit < 1:
        raise DataError(f"The limit is {limit}; give 1 or more items for each task, or none.")
    if any(map(auto_cap, budgets or ())):
        raise BudgetError("Tasks are scored at fixed budgets, not at auto; give fractions such as 0.75.")
    with hushed():
        with status("Reading tasks …"):
            tasks = load_tasks(names, task_data, task_path)
            for name, task in tasks.items():
                with _refusals_reported(name):
                    task.build_all_requests(limit=limit)
        with status(f"Loading {run.backbone} …"):
            routed = load_model(run)
        wanted = available_budgets(routed.router, run.recipe.budgets) if budgets is None else budgets
        layers = routed.geometry.layers
        fractions = {fraction_of(each, routed.executed_layers(each), layers): each for each in wanted}
        from buddy.evaluation.harness import BuddyLM

        data = run.recipe.data
        tokens = data.batch_size * data.window
        model = BuddyLM(routed, wanted[0], batch_tokens=tokens)
        with within_memory(f"a batch of {tokens} tokens", "free some, or use a machine with more"):
            return {"results": _over_budgets(model, tasks, fractions, limit)}


def _over_budgets(
    model: BuddyLM, tasks: dict[str, Task], budgets: dict[float, float | str], limit: int | None
) -> list[dict[str, Any]]:
    """An entry of the results for each task and budget."""
    found = []
    totals = [len(task.instances) for task in tasks.values() for _ in budgets]
    pairs = [(name, fraction) for name in tasks for fraction in budgets]
    with Bar("Scoring tasks", sum(totals)) as bar:
        for number, (name, fraction) in enumerate(pairs):
            note, scored = f"{name} at {budgets[fraction]}", [sum(totals[:number])]

            def on_scored(count: int, note: str = note, scored: list[int] = scored) -> None:
                scored.append(count)
                bar.update(sum(scored), note)

            model.ask(budgets[fraction])
            model.on_scored = on_scored
            found.append(_entry(model, name, tasks[name], fraction, limit))
            bar.update(sum(totals[: number + 1]), note)  # generated answers are not counted one by one
    return found


def _entry(model: BuddyLM, name: str, task: Task, budget: float, limit: int | None) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    task.set_fewshot_seed(FEWSHOT_SEED)  # otherwise each budget gets other examples
    with _refusals_reported(name):
        outcome = evaluate(model, {"tasks": {name: task}}, limit=limit, bootstrap_iters=BOOTSTRAPS)
    values = outcome["results"][name]
    metric, filtered = _metric(values)
    samples = [sample[metric] for sample in outcome["samples"][name] if sample["filter"] == filtered]
    stderr, ran = values.get(f"{metric}_stderr,{filtered}"), model.executed.tolist()
    executed = (
        {"min": min(ran), "mean": sum(ran) / len(ran), "max": max(ran)}
        if ran
        else dict.fromkeys(("min", "mean", "max"))
    )
    return {
        "task": name,
        "budget": budget,
        "layers": model.layers,
        "executed": executed,
        "metric": metric,
        "value": float(values[f"{metric},{filtered}"]),
        "stderr": float(stderr) if isinstance(stderr, float) else None,
        "items": len(samples),
        "correct": [int(sample) for sample in samples] if all(sample in (0, 1) for sample in samples) else None,
    }


@contextmanager
def _refusals_reported(name: str) -> Iterator[None]:
    """Turn lm-eval's ValueErrors and assertions within this block into DataErrors."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{name} cannot be scored ({reason(error)}); correct its definition or its items, or leave it out."
        ) from error


def _metric(values: dict[str, Any]) -> tuple[str, str]:
    """The metric to report and the filter of the answers that it is for."""
    pairs = [key.split(",", 1) for key in values if "," in key]
    metrics = {metric: filtered for metric, filtered in reversed(pairs) if not metric.endswith("_stderr")}
    metric = next((name for name in ("acc_norm", "acc") if name in metrics), None) or list(metrics)[-1]
    return metric, metrics[metric]


NEEDED = ("lm_eval", "accelerate")
FEWSHOT_SEED = 1234  # of lm-eval's command


def require_lm_eval() -> None:
    """Raises DataError with the command that installs lm-eval, where it is missing."""
    if any(find_spec(name) is None for name in NEEDED):
        raise DataError("Tasks need lm-eval, which is not installed; run: pip install 'buddy-depth[tasks]'")


def load_tasks(names: Sequence[str], task_data: Path | None = None, task_path: Path | None = None) -> dict[str, Task]:
    """The tasks of these names, those of a group or tag one by one, as lm-eval's command prepares them.

    Args:
        names: of tasks, groups or tags.
        task_data: a folder with NAME.jsonl for each task, instead of the hub's data sets.
        task_path: a folder of further definitions (YAML).

    Raises:
        DataError: an unknown name, data that cannot be had, or a task that runs code or needs more than text.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise DataError("No task was named; name at least one, such as piqa.")
    if task_data is not None and task_path is not None:
        raise DataError("Items come from --task-data or from the definitions in --task-path; give one of the two.")
    if task_data is not None:
        check_local(names, task_data)
        tasks = local_tasks(names, task_data, own_manager())
    else:
        tasks = _defined(names, own_manager() if task_path is None else _manager_with(task_path, names))
    for name, task in tasks.items():
        _check_kind(name, task)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks


@cache
def own_manager() -> TaskManager:
    """The index of lm-eval's own definitions, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def hushed() -> Iterator[None]:
    """Within this block lm-eval writes no log lines but errors, and shows no bar while it builds requests."""
    from lm_eval.api import task

    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, getattr(task, "tqdm", None)
    logger.setLevel(logging.ERROR)
    task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar


def _check_kind(name: str, task: Task) -> None:
    """Refuse now what lm-eval refuses later."""
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(
            f"{name} runs code that the model writes, which may do harm; leave it out, or run it where it can do none "
            "by python -m buddy.evaluation.lm_eval with --confirm_run_unsafe_code."
        )
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"{name} has pictures or sound in it, and Buddy's models read text alone; leave it out.")


def _manager_with(folder: Path, names: Sequence[str]) -> TaskManager:
    """An index of a folder's definitions, with lm-eval's own only where a name needs them."""
    from lm_eval.tasks import TaskManager

    if not folder.is_dir() or not any(folder.rglob("*.yaml")):
        raise DataError(f"{folder} is no folder with task definitions (.yaml) in it; check --task-path.")
    alone = TaskManager(include_path=str(folder), include_defaults=False)
    return alone if {*names} <= {*alone.all_subtasks} else TaskManager(include_path=str(folder))


def _defined(names: Sequence[str], manager: TaskManager) -> dict[str, Task]:
    from huggingface_hub.constants import is_offline_mode

    for name in names:
        if name not in manager.task_index:
            hint = nearest(name, manager.task_index) or "; `lm_eval ls tasks` lists all."
            raise DataError(f"lm-eval has no task named {name!r}{hint}")
    try:
        return manager.load(names)["tasks"]
    except Exception as error:  # data sets and definitions raise errors of every kind
        advice = (
            "connect to the network if its data are on the hub, correct its definition, or give items by --task-data"
        )
        if is_offline_mode():
            advice = "HF_HUB_OFFLINE is set, so the hub is out of reach: unset it, or give items by --task-data"
        raise DataError(f"{' or '.join(names)} cannot be loaded ({reason(error)}); {advice}.") from error


Line = Mapping[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Form:
    """The fields of a task's lines, and the document that lm-eval's definition reads from one.

    Attributes:
        texts: fields that hold text.
        document: makes it of a checked line.
        choices: how many there are; None for two or more.
        fixed: the choices themselves, where the task has no others.
    """

    texts: tuple[str, ...]
    document: Callable[[Line], dict[str, Any]]
    choices: int | None = None
    fixed: tuple[str, ...] | None = None


def _lettered(question: str) -> Callable[[Line], dict[str, Any]]:
    """Documents of ARC and OpenBookQA: the right choice is named by its letter."""

    def document(line: Line) -> dict[str, Any]:
        letters = list(LETTERS[: len(line["choices"])])
        choices = {"text": line["choices"], "label": letters}
        return {question: line["question"], "choices": choices, "answerKey": letters[line["label"]]}

    return document


def _piqa(line: Line) -> dict[str, Any]:
    one, other = line["choices"]
    return {"goal": line["question"], "sol1": one, "sol2": other, "label": line["label"]}


def _boolq(line: Line) -> dict[str, Any]:
    return {"passage": line["context"], "question": line["question"], "label": line["label"]}


def _hellaswag(line: Line) -> dict[str, Any]:
    return {"query": line["context"], "choices": line["choices"], "label": str(line["label"])}


def _social_iqa(line: Line) -> dict[str, Any]:
    answers = dict(zip(("answerA", "answerB", "answerC"), line["choices"], strict=True))
    return {"context": line["context"], "question": line["question"], **answers, "label": str(line["label"] + 1)}


def _winogrande(line: Line) -> dict[str, Any]:
    if line["question"].count("_") != 1:
        raise ValueError("its question needs one '_' where the choices go")
    one, other = line["choices"]
    return {"sentence": line["question"], "option1": one, "option2": other, "answer": str(line["label"] + 1)}


FORMS = {
    "arc_challenge": Form(("question",), _lettered("question")),
    "arc_easy": Form(("question",), _lettered("question")),
    "boolq": Form(("context", "question"), _boolq, fixed=("no", "yes")),
    # lm-eval cleans WikiHow's brackets away first; the context here is the query after that.
    "hellaswag": Form(("context",), _hellaswag),
    "openbookqa": Form(("question",), _lettered("question_stem")),
    "piqa": Form(("question",), _piqa, choices=2),
    "social_iqa": Form(("context", "question"), _social_iqa, choices=3),
    "winogrande": Form(("question",), _winogrande, choices=2),
}


def check_local(names: Sequence[str], folder: Path) -> None:
    """Raises DataError where a task has no local form or no file in the folder."""
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} of task files; check --task-data.")
    for name in names:
        if name not in FORMS:
            hint = nearest(name, FORMS) or f"; choose from {', '.join(FORMS)}."
            raise DataError(f"No task over local files is named {name!r}{hint}")
        if not (folder / f"{name}.jsonl").is_file():
            found = sorted(path.stem for path in folder.glob("*.jsonl") if path.stem in FORMS)
            there = f"it has those for {', '.join(found)}" if found else "it has none for any task"
            raise DataError(f"{folder} has no {name}.jsonl; {there}.")


def local_tasks(names: Sequence[str], folder: Path, manager: TaskManager) -> dict[str, Task]:
    """lm-eval's own tasks over the folder's files: its definitions, read by the `json` builder of `datasets`.

    Raises:
        DataError: a file is not JSON, is empty, or an item lacks what its task needs.
    """
    found: dict[str, Task] = {}
    for name in names:
        path = folder / f"{name}.jsonl"
        try:
            with quiet(path.stat().st_size):
                # As members of a group the definitions are found by name and overlaid.
                members = [{"task": name, **_overlay(FORMS[name], path)}]
                found |= manager.load([{"group": "local", "task": members}])["tasks"]
        except BuddyError:
            raise
        except Exception as error:  # errors of `datasets` and Arrow
            said = reason(error.__cause__ or error)
            raise DataError(f"{path} cannot be read ({said}); give it one JSON object a line, in UTF-8.") from error
    return found


def _overlay(form: Form, path: Path) -> dict[str, Any]:
    """The keys of a task's definition that make it read a local file and nothing else."""
    split = "validation"

    def documents(items: Dataset) -> Dataset:
        from datasets import Dataset

        found = [_document(form, item, f"{path} item {number}") for number, item in enumerate(items, start=1)]
        return Dataset.from_list(found)

    source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: str(path)}}}
    splits = {"training_split": None, "validation_split": split, "test_split": None, "fewshot_split": None}
    return {**source, **splits, "process_docs": documents}


def _document(form: Form, item: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        _check(form, item)
        return form.document(item)
    except ValueError as error:
        raise DataError(f"{where} cannot be used: {error}; correct or remove it.") from error


def _check(form: Form, line: Any) -> None:
    """Raises ValueError where a line lacks what its task needs."""
    for name in form.texts:
        if not isinstance(line.get(name), str) or not line[name].strip():
            raise ValueError(f"it needs the text {name!r}")
    choices, label = line.get("choices"), line.get("label")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("it needs 'choices', a list of texts")
    if form.fixed is not None and tuple(choices) != form.fixed:
        raise ValueError(f"its choices must be {list(form.fixed)}")
    if not 2 <= len(choices) <= len(LETTERS) or (form.choices is not None and len(choices) != form.choices):
        raise ValueError(f"it has {len(choices)} choices, not {form.choices or '2 or more'}")
    if type(label) is not int or not 0 <= label < len(choices):
        raise ValueError(f"its label is {label!r}, not the index of a choice, from 0 to {len(choices) - 1}")
