"""Runs with all that a comparison adds to them: evaluations on further texts and scores on tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from buddy.backbone.adapter import WEIGHTS
from buddy.builders.data import build_windows, check_unseen
from buddy.builders.model import counts_of, restore
from buddy.data.module import TextData
from buddy.data.text import named_sources, same_source
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, DamagedError, DataError, RunError
from buddy.evaluation.record import evaluation_file, task_file
from buddy.fit import Session
from buddy.io import checksum, read_json, within_memory, write_with_checksum
from buddy.metrics.perplexity import Scores, with_documents
from buddy.provenance import code_digest
from buddy.registry import load
from buddy.run import RunSpec, code_changed, folder_name
from buddy.run_files import ADAPTER, BRIDGE, ROUTER
from buddy.schema import Recipe


@dataclass(frozen=True)
class EvaluationText:
    """A text to evaluate on; `own` marks the recipe's own, whose test windows are used."""

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
    items: Mapping[str, str] = field(default_factory=dict)  # their digests by task, once they are read


def texts_of(text: str | None, recipe: Recipe) -> list[EvaluationText]:
    """The recipe's own text and those in "SOURCE,label=SOURCE,…"; its own may be named too, to give it a label.

    Raises:
        DataError: nothing is named, two have one label, a label cannot be a file name, or a text is trained on.
    """
    source = recipe.data.source
    own = folder_name(*named_sources(None, source))
    others = {} if text is None else named_sources(text, source)
    for label in [label for label, other in others.items() if same_source(other, source)]:
        own = label
        del others[label]
    if own in others:
        raise DataError(
            f"Two texts are called {own!r}, one of them the recipe's own; give the other a name, as in --domains "
            f"other={others[own]}."
        )
    for label, other in others.items():
        check_unseen(recipe, other)
        if not re.fullmatch(r"[\w.-]{1,60}", label):
            raise DataError(
                f"The label {label!r} cannot be a file name; give at most 60 letters, digits, dots and hyphens, "
                f"as in --domains other={other}."
            )
    return [EvaluationText(own, source, own=True), *(EvaluationText(label, other) for label, other in others.items())]


def read_windows(text: EvaluationText, recipe: Recipe, data: TextData) -> Windows:
    """`data.test_windows` windows of a text, drawn with the data's seed; or `data.validation_windows` of others.

    Raises:
        DataError: the text cannot be read, or another text than the recipe's is too short.
    """
    if text.own:
        return data.evaluated
    section = recipe.data
    windows = build_windows(recipe, data.tokenizer, text.source, count=section.test_windows, seen=data.text_digests)
    if section.evaluate_on == "validation":
        both = section.test_windows + section.validation_windows
        more = build_windows(recipe, data.tokenizer, text.source, count=both)
        unread = ~torch.isin(more.documents, windows.documents)
        windows = more[unread][: section.validation_windows]
        if len(windows) < section.validation_windows:
            raise DataError(
                f"The text in {text.source} gives {len(windows)} validation windows, from documents without a test "
                f"window, and data.validation_windows asks for {section.validation_windows}; give more text, or set "
                f"data.test_windows below {section.test_windows}."
            )
    elif len(windows) < section.test_windows:
        raise DataError(
            f"The text in {text.source} gives {len(windows)} windows of {section.window} tokens, and data.test_windows "
            f"asks for {section.test_windows}; give more text, or set it to {len(windows)}."
        )
    return windows


class Worker:
    """Does what is missing of runs: fits, evaluates on every text, scores on every task. Complete parts stay.

    Args:
        session: backbone and text.
        windows: of each text.
        tasks: what runs are scored on.
    """

    def __init__(self, session: Session, windows: Mapping[EvaluationText, Windows], tasks: Tasks) -> None:
        self._session, self._windows, self._tasks = session, windows, tasks
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
        except BuddyError as error:
            return str(error)
        except Exception as error:
            return str(spec.unexpected(error))

    def _run(self, spec: RunSpec) -> None:
        with spec.run_folder.lock():  # which completes what a kill left half done
            complete = spec.run_folder.is_complete
        if not complete:
            self._session.fit(spec)
        weights = _weights(spec)
        texts, tasks = {}, {}  # that are missing: the file of each, and what its result depends on
        for text, windows in self._windows.items():
            path = evaluation_file(spec.folder, text.label, text.own)
            key = {"windows": windows.fingerprint, **weights}
            if not text.own and not _has(path, key):
                texts[text] = path, key
        for name in self._tasks.names:
            path, key = task_file(spec.folder, name), _task_content(name, self._tasks) | weights
            if not _has(path, key):
                tasks[name] = path, key
        if not texts and not tasks:
            return
        if complete and code_changed(spec.folder, code_digest(load(spec.recipe.router.name))):
            raise RunError(
                f"The router's code is not that of {spec.folder} (its file or Buddy's version changed), so further "
                "results would be of another router; restore the code, or delete that folder."
            )
        with self._session.model(spec.recipe) as model:
            restore(model, spec.recipe, spec.folder)
            for text, (path, key) in texts.items():
                _write(path, key | with_documents(self._evaluate(spec, text, model)))
            for name, (path, key) in tasks.items():
                _write(path, key | {"results": self._task_entries(spec, name, model)})

    def _evaluate(self, spec: RunSpec, text: EvaluationText, model: RoutedLM) -> list[Scores]:
        data, title = spec.recipe.data, f"Evaluating {spec.label} on {text.label}"
        sizes = f"a batch of {data.batch_size} × {data.window} tokens"
        with within_memory(sizes, "free some, or compare anew with data.batch_size smaller and another --out"):
            return self._session.evaluate(spec.recipe, model, self._windows[text], title)

    def _task_entries(self, spec: RunSpec, name: str, model: RoutedLM) -> list[dict[str, Any]]:
        """One entry for each budget; full depth is computed once for all runs, unless adapters change it."""
        from buddy.evaluation.tasks import task_scores

        tasks, depth, healed = self._tasks, self._session.backbone.num_layers, model.adapter is not None
        known = None if healed else self._full_depth.get(name)
        layers = counts_of(spec.recipe, model)
        todo = [budget for budget, count in layers.items() if known is None or count < depth]
        options = (tasks.limit, tasks.data, tasks.path, model)
        found = task_scores(spec.folder, [name], todo, *options)["results"] if todo else []
        entries = {entry["budget"]: entry for entry in found}
        full = [entry for entry in found if entry["layers"] == depth]
        if full and not healed:
            self._full_depth[name] = full[0]
        return [entries.get(budget) or {**(known or {}), "budget": budget} for budget in layers]


def run_in_worker(texts: Sequence[EvaluationText], tasks: Tasks, spec: RunSpec) -> str | None:
    """`Worker.run` in a process that does several runs and loads backbone and texts once.

    Args:
        texts: what runs are evaluated on.
        tasks: what they are scored on.
        spec: the run.
    """
    if not _workers:
        session = Session.prepare([spec.recipe])
        windows = {text: read_windows(text, spec.recipe, session.data) for text in texts}
        _workers.append(Worker(session, windows, tasks))
    return _workers[0].run(spec)


_workers: list[Worker] = []  # of this process, at most one


def _weights(spec: RunSpec) -> dict[str, str]:
    """Digests of what was fitted: the router, and bridges and adapter where the run has them."""
    files = {"router": ROUTER, "bridge": BRIDGE, "adapter": f"{ADAPTER}/{WEIGHTS}"}
    return {name: checksum(path) for name, file in files.items() if (path := spec.folder / file).exists()}


def _task_content(name: str, tasks: Tasks) -> dict[str, Any]:
    """Digests of a task's items and definitions, and how many items are scored."""
    found = sorted(path for path in tasks.path.rglob("*") if path.is_file()) if tasks.path else []
    own = [path for path in found if "__pycache__" not in path.parts]  # lm-eval writes there
    return {
        "limit": tasks.limit,
        "lm_eval": version("lm_eval"),
        "items": tasks.items[name],
        "definitions": [checksum(path) for path in own],
    }


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_with_checksum(path, value)


def _has(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether a file of results is whole and was made with these values."""
    try:
        stored = read_json(path)
    except BuddyError:  # missing or damaged
        return False
    return all(stored.get(name) == value for name, value in key.items())
