"""Names → lm-eval's tasks: its own, those of a folder of definitions, or its own over local files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from buddy.errors import DataError, nearest, reason
from buddy.evaluation.tasks import check_local, local_tasks

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

NEEDED = ("lm_eval", "accelerate")
FEWSHOT_SEED = 1234  # of lm-eval's command


def require_lm_eval() -> None:
    """Raises DataError, which says what to install, where lm-eval is missing."""
    if any(find_spec(name) is None for name in NEEDED):
        raise DataError("Tasks need lm-eval, which is not installed; run: pip install 'buddy-depth[tasks]'")


def load_tasks(names: Sequence[str], task_data: Path | None = None, task_path: Path | None = None) -> dict[str, Task]:
    """The tasks of these names, those of a group or tag one by one, as lm-eval's command prepares them.

    Args:
        names: of tasks, groups or tags.
        task_data: a folder with NAME.jsonl for each task, instead of the hub's data sets.
        task_path: a folder of definitions (YAML) of one's own, beside lm-eval's.

    Raises:
        DataError: an unknown name, data that cannot be had, or a task that runs code or needs more than text.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise DataError("No task was named; name at least one, such as piqa.")
    if task_data is not None and task_path is not None:
        raise DataError("Items come from --task-data, or as the definitions in --task-path say; give one of the two.")
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
    """Within this block lm-eval writes no log lines but errors, and no bar over items that it only puts into words."""
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
    """What lm-eval itself refuses, only later."""
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(
            f"{name} runs code that the model writes, which may do harm; leave it out, or run it where it can do none "
            "by python -m buddy.evaluation.lm_eval with --confirm_run_unsafe_code."
        )
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"{name} has pictures or sound in it, and Buddy's models read text alone; leave it out.")


def _manager_with(folder: Path, names: Sequence[str]) -> TaskManager:
    """An index with a folder's definitions; lm-eval's own are in it where these alone do not do."""
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
    except Exception as error:  # data sets and definitions fail in as many ways as there are to write one
        advice = "connect to the network if its data are on the hub, mend its definition, or give items by --task-data"
        if is_offline_mode():
            advice = "HF_HUB_OFFLINE is set, so the hub is out of reach: unset it, or give items by --task-data"
        raise DataError(f"{' or '.join(names)} cannot be loaded ({reason(error)}); {advice}.") from error
