"""A worker: does runs one after the other in one process, with one backbone and one set of texts."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from buddy.backbone.adapter import WEIGHTS
from buddy.build import build_windows, restore
from buddy.data.module import TextData
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, DamagedError, DataError, TrainingError, reason
from buddy.evaluation.record import EVALUATIONS, TASKS, evaluation_file, task_file
from buddy.fit import RunSpec, Session
from buddy.io import checksum, read_json, within_memory, write_text, write_with_checksum
from buddy.metrics.perplexity import Reference, with_documents
from buddy.router import available_budgets
from buddy.run_files import ADAPTER, ROUTER
from buddy.schema import Recipe


@dataclass(frozen=True)
class Text:
    """A text to evaluate on; `own` is the recipe's, of which the test windows are taken."""

    label: str
    source: str
    own: bool = False


@dataclass(frozen=True)
class Tasks:
    """lm-eval's tasks that every run is scored on; see `buddy.evaluation.tasks`."""

    names: tuple[str, ...] = ()
    limit: int | None = None
    data: Path | None = None
    path: Path | None = None


def read_windows(text: Text, recipe: Recipe, data: TextData) -> Windows:
    """`data.test_windows` windows of a text, drawn with the data's seed.

    Raises:
        DataError: the text cannot be read, or another text than the recipe's is too short.
    """
    if text.own:
        return data.test
    section = recipe.data
    windows = build_windows(recipe, data.tokenizer, text.source, count=section.test_windows)
    if len(windows) < section.test_windows:
        raise DataError(
            f"The text in {text.source} gives {len(windows)} windows of {section.window} tokens, and data.test_windows "
            f"asks for {section.test_windows}; give more text, or set data.test_windows={len(windows)}."
        )
    return windows


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker process needs to make runs; small enough to send. Calling it does one run.

    Attributes:
        recipe: of any of the runs.
        texts: what runs are evaluated on.
        tasks: what they are scored on.
    """

    recipe: Recipe
    texts: tuple[Text, ...]
    tasks: Tasks

    def __call__(self, spec: RunSpec) -> str | None:
        """`Worker.run`, with backbone and text that are loaded once a process."""
        if not _workers or _workers[-1][0] != self:
            session = Session.prepare([self.recipe])
            windows = {text: read_windows(text, self.recipe, session.data) for text in self.texts}
            _workers[:] = [(self, Worker(session, windows, self.tasks))]
        return _workers[-1][1].run(spec)


_workers: list[tuple[WorkerConfig, Worker]] = []  # of this process, at most one


class Worker:
    """Does what is missing of runs: fits, evaluates on every text, scores on every task. Complete parts stay.

    Args:
        session: backbone and text.
        windows: of each text.
        tasks: what runs are scored on.
    """

    def __init__(self, session: Session, windows: Mapping[Text, Windows], tasks: Tasks) -> None:
        self._session, self._windows, self._tasks = session, windows, tasks
        self._references = {text: Reference() for text in windows}
        self._full_depth: dict[str, dict[str, Any]] = {}  # a task's entry at full depth, the same for every router

    def run(self, spec: RunSpec) -> str | None:
        """Do a run.

        Returns:
            None, or why it failed, in one sentence. Every error but an interrupt is caught, since a router may be
            third-party code, and the other runs continue.
        """
        try:
            self._run(spec)
            return None
        except DamagedError as error:
            return f"{error.path} is damaged ({error.reason}); delete {spec.folder} and repeat the command."
        except TrainingError as error:
            return f"{error} Give another --out with it: a comparison resumes no checkpoint of other keys."
        except BuddyError as error:
            return str(error)
        except Exception as error:
            spec.log.parent.mkdir(parents=True, exist_ok=True)
            write_text(spec.log, traceback.format_exc())
            return f"{type(error).__name__}: {reason(error)}; the traceback is in {spec.log}."

    def _run(self, spec: RunSpec) -> None:
        if not spec.run_folder.is_complete:
            self._session.fit(spec)
        for name in (EVALUATIONS, TASKS) if self._tasks.names else (EVALUATIONS,):
            (spec.folder / name).mkdir(exist_ok=True)
        missing = [text for text in self._windows if not text.own and not self._is_evaluated(spec, text)]
        if missing:
            with self._session.model(spec.recipe) as model:
                restore(model, spec.recipe, spec.folder)
                for text in missing:
                    self._evaluate(spec, text, model)
        for name in self._tasks.names:
            self._score(spec, name)

    def _evaluate(self, spec: RunSpec, text: Text, model: RoutedLM) -> None:
        data, title = spec.recipe.data, f"Evaluating {spec.label} on {text.label}"
        sizes = f"a batch of {data.batch_size} × {data.window} tokens"
        with within_memory(sizes, "free some, or compare anew with data.batch_size smaller and another --out"):
            scores = self._session.evaluate(spec.recipe, model, self._windows[text], self._references[text], title)
        path = evaluation_file(spec.folder, text.label, own=False)
        write_with_checksum(path, self._evaluation_key(spec, text) | with_documents(scores))

    def _is_evaluated(self, spec: RunSpec, text: Text) -> bool:
        return _has(evaluation_file(spec.folder, text.label, own=False), self._evaluation_key(spec, text))

    def _evaluation_key(self, spec: RunSpec, text: Text) -> dict[str, Any]:
        """What a result on a text depends on."""
        return {"windows": self._windows[text].fingerprint, **_weights(spec)}

    def _score(self, spec: RunSpec, name: str) -> None:
        tasks, path = self._tasks, task_file(spec.folder, name)
        folders = {key: folder and str(folder) for key, folder in (("data", tasks.data), ("path", tasks.path))}
        key = {"limit": tasks.limit, **_weights(spec), **folders, **_task_content(name, tasks)}
        if not _has(path, key):
            write_with_checksum(path, key | {"results": self._task_entries(spec, name, healed="adapter" in key)})

    def _task_entries(self, spec: RunSpec, name: str, healed: bool) -> list[dict[str, Any]]:
        """One entry for each budget; full depth is computed once for all runs, unless adapters change it."""
        from buddy.evaluation.tasks import task_scores

        tasks, depth = self._tasks, self._session.backbone.num_layers
        known = None if healed else self._full_depth.get(name)
        with self._session.model(spec.recipe) as model:
            budgets = available_budgets(model.router, spec.recipe.budgets)
            layers = {budget: model.executed_layers(budget) for budget in budgets}
        todo = [budget for budget, count in layers.items() if known is None or count < depth]
        found = task_scores(spec.folder, [name], todo, tasks.limit, tasks.data, tasks.path)["results"] if todo else []
        entries = {entry["budget"]: entry for entry in found}
        full = [entry for entry in found if entry["layers"] == depth]
        if full and not healed:
            self._full_depth[name] = full[0]
        return [entries.get(budget) or {**(known or {}), "budget": budget} for budget in layers]


def _weights(spec: RunSpec) -> dict[str, str]:
    """Digests of what was fitted: the router, and the adapter of a healed run."""
    adapter = spec.folder / ADAPTER / WEIGHTS
    return {"router": checksum(spec.folder / ROUTER)} | ({"adapter": checksum(adapter)} if adapter.exists() else {})


def _task_content(name: str, tasks: Tasks) -> dict[str, Any]:
    """Digests of a task's items and definitions."""
    items = tasks.data / f"{name}.jsonl" if tasks.data else None
    own = sorted(path for path in tasks.path.rglob("*") if path.is_file()) if tasks.path else []
    return {
        "lm_eval": version("lm_eval"),
        "lines": checksum(items) if items and items.is_file() else None,
        "definitions": [checksum(path) for path in own],
    }


def _has(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether a file of results is whole and was made with these values."""
    try:
        stored = read_json(path)
    except BuddyError:  # missing or damaged
        return False
    return all(stored.get(name) == value for name, value in key.items())
