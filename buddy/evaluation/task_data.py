"""lm-eval's tasks: from the hub, from a folder of definitions, or from local items in one form for all tasks."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buddy.data.text import quiet, refuse_null
from buddy.errors import BuddyError, DataError, did_you_mean, reason

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

NEEDED = ("lm_eval", "accelerate")
FEWSHOT_SEED = 1234  # of lm-eval's command
Item = Mapping[str, Any]


def require_lm_eval() -> None:
    """Raises DataError with the command that installs lm-eval, where it is missing."""
    if any(find_spec(name) is None for name in NEEDED):
        raise DataError("Tasks need lm-eval, which is not installed; install Buddy with its extra `tasks`.")


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
    tasks = _defined(names, task_path) if task_data is None else local_tasks(names, task_data)
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise DataError(f"{name} runs code that the model writes, which may do harm; leave it out.")
        if getattr(task, "MULTIMODAL", False):
            raise DataError(f"{name} has pictures or sound in it, and Buddy's models read text alone; leave it out.")
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tasks


@cache
def own_manager() -> TaskManager:
    """The index of lm-eval's own definitions, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def items_digest(task: Task) -> str:
    """Of all items that a task scores."""
    text = json.dumps([*task.eval_docs], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
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


def _defined(names: Sequence[str], folder: Path | None) -> dict[str, Task]:
    """Tasks as lm-eval or the definitions in a folder have them."""
    from huggingface_hub.constants import is_offline_mode

    try:
        manager = own_manager() if folder is None else _manager_with(folder, names)
        for name in names:
            if name not in manager.task_index:
                hint = did_you_mean(name, manager.task_index) or "; `lm_eval ls tasks` lists all."
                raise DataError(f"lm-eval has no task named {name!r}{hint}")
        return manager.load(names)["tasks"]
    except DataError:
        raise
    except Exception as error:  # data sets and definitions raise errors of every kind
        connect = "unset HF_HUB_OFFLINE, so that the hub can be read" if is_offline_mode() else "connect to the network"
        advice = f"{connect}, or give items by --task-data"
        if folder is not None:
            advice = f"correct its definition, or, if its data are on the hub, {connect}"
        raise DataError(f"{' or '.join(names)} cannot be loaded ({reason(error)}); {advice}.") from error


def _manager_with(folder: Path, names: Sequence[str]) -> TaskManager:
    """An index of a folder's definitions, with lm-eval's own only where a name needs them."""
    from lm_eval.tasks import TaskManager

    if not any(folder.rglob("*.yaml")):
        raise DataError(f"{folder} is no folder with task definitions (.yaml) in it; check --task-path.")
    alone = TaskManager(include_path=str(folder), include_defaults=False)
    return alone if {*names} <= {*alone.all_subtasks} else TaskManager(include_path=str(folder))


# Local items


def local_tasks(names: Sequence[str], folder: Path) -> dict[str, Task]:
    """lm-eval's own tasks over the folder's NAME.jsonl: its definitions, read by the `json` builder of `datasets`.

    Raises:
        DataError: a task has no local form or no file, a file is not JSON or is empty, or an item lacks what its task
            needs.
    """
    for name in names:
        if name not in FORMS:
            hint = did_you_mean(name, FORMS) or f"; choose from {', '.join(FORMS)}."
            raise DataError(f"No task over local files is named {name!r}{hint}")
        if not os.path.isfile(folder / f"{name}.jsonl"):
            raise DataError(f"There is no file {folder / name}.jsonl; check --task-data.")
    found: dict[str, Task] = {}
    for name in names:
        path = folder / f"{name}.jsonl"
        try:
            if not path.stat().st_size:
                raise DataError(f"{path} is empty; give it one JSON object a line.")
            refuse_null([path])
            with quiet(path.stat().st_size):
                # As members of a group the definitions are found by name and overlaid.
                member = {"task": name, **_overlay(FORMS[name], path)}
                found |= own_manager().load([{"group": "local", "task": [member]}])["tasks"]
        except BuddyError:
            raise
        except Exception as error:  # errors of `datasets` and Arrow
            said = reason(error.__cause__ or error)
            raise DataError(f"{path} cannot be read ({said}); give it one JSON object a line, in UTF-8.") from error
    return found


@dataclass(frozen=True)
class Form:
    """The fields of a task's items, and the document that lm-eval's definition reads from one.

    Attributes:
        texts: fields that hold text, beside "choices" and "label".
        document: makes it of an item; a ValueError says why it cannot.
        choices: how many there are; None for two or more.
    """

    texts: tuple[str, ...]
    document: Callable[[Item], dict[str, Any]]
    choices: int | None = None


def _lettered(question: str) -> Callable[[Item], dict[str, Any]]:
    """Documents of ARC and OpenBookQA: the right choice is named by its letter."""

    def document(item: Item) -> dict[str, Any]:
        letters = [chr(ord("A") + place) for place in range(len(item["choices"]))]
        choices = {"text": item["choices"], "label": letters}
        return {question: item["question"], "choices": choices, "answerKey": letters[item["label"]]}

    return document


def _piqa(item: Item) -> dict[str, Any]:
    one, other = item["choices"]
    return {"goal": item["question"], "sol1": one, "sol2": other, "label": item["label"]}


def _boolq(item: Item) -> dict[str, Any]:
    if item["choices"] != ["no", "yes"]:
        raise ValueError("its choices must be ['no', 'yes']")
    return {"passage": item["context"], "question": item["question"], "label": item["label"]}


def _hellaswag(item: Item) -> dict[str, Any]:
    return {"query": item["context"], "choices": item["choices"], "label": str(item["label"])}


def _social_iqa(item: Item) -> dict[str, Any]:
    answers = dict(zip(("answerA", "answerB", "answerC"), item["choices"], strict=True))
    return {"context": item["context"], "question": item["question"], **answers, "label": str(item["label"] + 1)}


def _winogrande(item: Item) -> dict[str, Any]:
    if item["question"].count("_") != 1:
        raise ValueError("its question needs one '_' where the choices go")
    one, other = item["choices"]
    return {"sentence": item["question"], "option1": one, "option2": other, "answer": str(item["label"] + 1)}


FORMS = {
    "arc_challenge": Form(("question",), _lettered("question")),
    "arc_easy": Form(("question",), _lettered("question")),
    "boolq": Form(("context", "question"), _boolq),
    # lm-eval cleans WikiHow's brackets away first; the context here is the query after that.
    "hellaswag": Form(("context",), _hellaswag),
    "openbookqa": Form(("question",), _lettered("question_stem")),
    "piqa": Form(("question",), _piqa, choices=2),
    "social_iqa": Form(("context", "question"), _social_iqa, choices=3),
    "winogrande": Form(("question",), _winogrande, choices=2),
}


def _overlay(form: Form, path: Path) -> dict[str, Any]:
    """The keys of a task's definition that make it read a local file and nothing else."""
    split = "validation"

    def documents(items: Dataset) -> Dataset:
        from datasets import Dataset

        found = []
        for number, item in enumerate(items, start=1):
            try:
                _check(form, item)
                found.append(form.document(item))
            except ValueError as error:
                raise DataError(f"{path} item {number} cannot be used: {error}; correct or remove it.") from error
        return Dataset.from_list(found)

    # `datasets` takes the path for a pattern, and finds cached rows by path and time alone, hence the size in the name.
    files = {"data_files": {split: glob.escape(str(path))}}
    source = {"dataset_path": "json", "dataset_name": f"size-{path.stat().st_size}", "dataset_kwargs": files}
    splits = {"training_split": None, "validation_split": split, "test_split": None, "fewshot_split": None}
    return {**source, **splits, "process_docs": documents}


def _check(form: Form, item: Item) -> None:
    """Raises ValueError where an item lacks what its task needs."""
    for name in form.texts:
        if not isinstance(item.get(name), str) or not item[name].strip():
            raise ValueError(f"it needs the text {name!r}")
    choices, label = item.get("choices"), item.get("label")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("it needs 'choices', a list of texts")
    if len(choices) < 2 or form.choices not in (None, len(choices)):
        raise ValueError(f"it has {len(choices)} choices, not {form.choices or '2 or more'}")
    if type(label) is not int or not 0 <= label < len(choices):
        raise ValueError(f"its label is {label!r}, not the index of a choice, from 0 to {len(choices) - 1}")
