"""comparison.json: all that was asked and found, from which every table and figure can be made again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from buddy.comparison.asked import Tasks
from buddy.comparison.command import shown_path, shown_text
from buddy.comparison.domains import Domain
from buddy.comparison.machine import machine, versions
from buddy.comparison.planned import Planned, is_finished
from buddy.comparison.work import Texts, evaluation_file, task_file
from buddy.config import Recipe, flatten
from buddy.errors import BuddyError, RunError
from buddy.io import read_json, write_text
from buddy.registry import load
from buddy.run import read_metrics

FORMAT = 1
KEYS = (
    "command",
    "created",
    "recipe",
    "layers",
    "versions",
    "machine",
    "domains",
    "routers",
    "runs",
    "failures",
    "tasks",
)


def record_of(
    *,
    command: str,
    recipe: Recipe,
    layers: int,
    texts: Texts,
    tasks: Tasks,
    runs: Mapping[str, Sequence[Planned]],
    failures: Sequence[tuple[Planned, str]],
    speed: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What is to be saved of a comparison, read from the folders of its runs.

    Args:
        command: as a person would type it again.
        recipe: of all runs, but for router and seed.
        layers: L of the backbone.
        texts: windows of each domain.
        tasks: what runs were scored on.
        runs: of each router, by label, in the order of the rows.
        failures: runs that failed, and why.
        speed: times, where they were measured.
    """
    failed = [run.folder for run, _ in failures]
    return {
        "format": FORMAT,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": {
            key: shown_text(value) if isinstance(value, str) else value for key, value in flatten(recipe).items()
        },
        "layers": layers,
        "versions": versions(),
        "machine": machine(),
        "domains": [_domain(domain, texts) for domain in texts],
        "tasks": {"names": list(tasks.names), "limit": tasks.limit},
        "routers": [_router(group[0]) for group in runs.values()],
        "runs": [_run(run, texts, tasks) for group in runs.values() for run in group if run.folder not in failed],
        "speed": speed,
        "failures": [{"router": run.label, "seed": run.seed, "reason": reason} for run, reason in failures],
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write indented JSON, whole or not at all; lists of numbers keep to one line, for there are thousands of them."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, text + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A comparison that was saved.

    Raises:
        RunError: missing, not one, or made by a newer Buddy.
    """
    if os.path.isdir(path):
        raise RunError(f"{path} is a folder; name the comparison.json in it.")
    try:
        found = read_json(path)
    except BuddyError as error:
        if not os.path.exists(path):
            raise RunError(f"There is no file {path}; name the comparison.json that `buddy compare` wrote.") from error
        raise RunError(f"{path} is damaged; make it again with the `buddy compare` that made it.") from error
    made = found.get("format")
    if isinstance(made, int) and made > FORMAT:
        raise RunError(f"{path} was made by a newer Buddy (format {made}); upgrade Buddy to read it.")
    missing = [key for key in KEYS if key not in found]
    if made != FORMAT or missing:
        raise RunError(f"{path} is no comparison; name the comparison.json that `buddy compare` wrote.")
    return found


def _domain(domain: Domain, texts: Texts) -> dict[str, Any]:
    windows = texts[domain]
    return {
        "label": domain.label,
        "source": shown_path(domain.source),
        "own": domain.own,
        "windows": len(windows),
        "documents": len(windows.documents.unique()),
        "fingerprint": windows.fingerprint,
    }


def _router(run: Planned) -> dict[str, Any]:
    section = run.recipe.router
    cls = load(section.name)
    return {
        "label": run.label,
        "folder": run.folder.parent.name,
        "name": section.name,
        "options": dict(section.options),
        "kind": cls.kind,
        "source": cls.source,
        "full_depth": cls.full_depth,
    }


def _run(run: Planned, texts: Texts, tasks: Tasks) -> dict[str, Any]:
    assert is_finished(run)
    found = {domain.label: read_json(evaluation_file(run, domain)) for domain in texts}
    scored = [entry for name in tasks.names for entry in read_json(task_file(run, name))["results"]]
    return {
        "router": run.label,
        "seed": run.seed,
        "fit": read_metrics(run.folder)["fit"],
        "domains": {
            label: {"results": each["results"], "documents": each["documents"]} for label, each in found.items()
        },
        "tasks": scored,
    }
