"""comparison.json, and what is made from it.

It is collected from finished runs, written with its tables and figures, read, and joined with others.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from buddy import console
from buddy.config import REMOVED, RENAMED, flatten
from buddy.data.windows import Windows
from buddy.errors import BuddyError, RunError
from buddy.evaluation.figures import draw_all, write_tensorboard
from buddy.evaluation.results import Results
from buddy.evaluation.tables import render, show
from buddy.io import check_output_path, read_json, write_text
from buddy.provenance import CKPT_KEY, CODE, ESTIMATOR_KEYS, IGNORED_KEYS, machine, versions
from buddy.registry import load
from buddy.run import read_run
from buddy.run_files import METRICS, read_metrics
from buddy.schema import COMPLETE, Recipe

JSON, CSV, MARKDOWN = "comparison.json", "comparison.csv", "results.md"
FORMAT = 1
EVALUATIONS, TASKS = "evaluations", "tasks"  # folders in a run folder: results on further texts, and on tasks
PROVENANCE = ("command", "created", "versions", "machine")  # how each part of a joined comparison was made
# Prefixes of recipe keys that may differ between joined comparisons.
MAY_DIFFER = ("router.", "seed", *IGNORED_KEYS, CKPT_KEY, *REMOVED)


def collect(
    runs: Mapping[str, Sequence[Path]],
    *,
    command: str,
    recipe: Recipe,
    digests: Mapping[str, str],
    layers: int,
    calibration_windows: int,
    texts: Sequence[Mapping[str, Any]],
    tasks: Sequence[str] = (),
    task_limit: int | None = None,
    speed: Mapping[str, Any] | None = None,
    failures: Sequence[tuple[str, int, str]] = (),
) -> dict[str, Any]:
    """The content of comparison.json, read from complete run folders.

    Args:
        runs: the folders of each router's runs, one a seed, by label in the order of the rows.
        command: makes it again, without folders (see `shown_command`).
        recipe: of all runs, but for router and seed.
        digests: of the inputs, as `Session.digests` gives them. Those in a run may be of another training text, where
            that changes nothing in the run.
        layers: L of the backbone.
        calibration_windows: that the texts gave, perhaps fewer than the recipe asks for.
        texts: `text_entry` of each text; results on the recipe's own are in metrics.json, others in `evaluation_file`.
        tasks: names of tasks that runs were scored on, each in `task_file`.
        task_limit: items of each task, if not all.
        speed: times, as `buddy.evaluation.bench.measured` gives them.
        failures: label, seed and reason of each run that failed.

    Raises:
        RunError: a run is damaged or incomplete.
    """
    flat: dict[str, Any] = flatten(recipe)
    inputs = {name: digest for name, digest in digests.items() if name != CODE}
    for folder in (each for folders in runs.values() for each in folders):
        for name in tasks:
            stored = read_json(task_file(folder, name))
            inputs[f"items of {name}"] = " ".join([stored["items"], *stored["definitions"]])
    return {
        "format": FORMAT,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        "recipe": {key: _shown_text(value) if isinstance(value, str) else value for key, value in flat.items()},
        "layers": layers,
        "calibration_windows": calibration_windows,
        "versions": versions(),
        "machine": machine(),
        "domains": [dict(text) for text in texts],
        "tasks": {"names": list(tasks), "limit": task_limit},
        "routers": [_router_entry(label, folders[0]) for label, folders in runs.items()],
        "runs": [_run_entry(label, each, texts, tasks) for label, folders in runs.items() for each in folders],
        "speed": speed,
        "failures": [{"router": label, "seed": seed, "reason": reason} for label, seed, reason in failures],
    }


def text_entry(label: str, source: str, windows: Windows, *, own: bool) -> dict[str, Any]:
    """The entry of a text in comparison.json; `own` marks the recipe's text, whose results are in metrics.json."""
    counts = {"windows": len(windows), "documents": len(windows.documents.unique())}
    return {"label": label, "source": shown_path(source), "own": own, **counts, "fingerprint": windows.fingerprint}


def evaluation_file(folder: Path, label: str, own: bool) -> Path:
    """The file with a run's results on a text."""
    return folder / METRICS if own else folder / EVALUATIONS / f"{label}.json"


def task_file(folder: Path, name: str) -> Path:
    """The file with a run's results on a task."""
    return folder / TASKS / f"{name.replace('/', '-')}.json"


# Writing and reading


def write_results(record: Mapping[str, Any], folder: Path, markdown: Path | None = None) -> None:
    """Write JSON, CSV, Markdown, figures and TensorBoard's files into a folder, and print the tables.

    Args:
        record: of `collect`.
        folder: of the comparison.
        markdown: where the document is written once more.
    """
    results = Results(record)
    write_record(folder / JSON, record)
    write_text(folder / CSV, results.csv())
    figures = _write_markdown(results, folder / MARKDOWN)
    write_tensorboard(results, folder, figures)
    show(results)
    if markdown:
        _write_markdown(results, markdown, f"{markdown.stem}-")
    lines = {
        "Results": markdown or folder / MARKDOWN,
        "Figures": ", ".join(map(str, figures.values())),
        "Data": f"{folder / JSON}, {folder / CSV}",
        "TensorBoard": f"tensorboard --logdir {shlex.quote(str(folder))}",
    }
    for name, where in lines.items():
        console.stdout.print(f"{name + ':':12} {where}")


def show_files(files: Sequence[Path], markdown: Path | None = None) -> None:
    """`buddy compare --from`: show one comparison.json or several as one, and write them as Markdown with figures.

    Args:
        files: several are joined.
        markdown: where to write the document; None for nowhere.

    Raises:
        RunError: a file is no comparison, they cannot be joined, or the document cannot be written.
    """
    records = {path: read_record(path) for path in dict.fromkeys(files)}
    for path, record in records.items():
        try:
            render(results := Results(record), {})
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(path) from error
    if len(records) > 1:
        results = Results(join(records))
    if markdown:
        check_output_path(markdown, *files)
        _write_markdown(results, markdown, f"{markdown.stem}-")
    show(results)


def _write_markdown(results: Results, path: Path, prefix: str = "") -> dict[str, Path]:
    """Write the document with its figures beside it.

    Returns:
        The figures by name.
    """
    figures = draw_all(results, path.parent, prefix)
    links = {name: each.relative_to(path.parent).as_posix() for name, each in figures.items()}
    write_text(path, render(results, links))
    return figures


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write indented JSON atomically, each list of numbers on one line."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([-+\d.eE,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, text + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A comparison.json.

    Raises:
        RunError: the file is missing, is no comparison, or a newer Buddy wrote it.
    """
    if os.path.isdir(path):
        raise RunError(f"{path} is a folder; name the comparison.json in it.")
    try:
        found = read_json(path)
    except BuddyError as error:
        if not os.path.exists(path):
            raise RunError(f"There is no file {path}; name the comparison.json that `buddy compare` wrote.") from error
        raise _damaged(path) from error
    made = found.get("format")
    if isinstance(made, int) and made > FORMAT:
        raise RunError(f"{path} was made by a newer Buddy (format {made}); upgrade Buddy to read it.")
    if made != FORMAT:
        raise RunError(f"{path} is no comparison; name the comparison.json that `buddy compare` wrote.")
    return found


def _damaged(path: Path) -> RunError:
    return RunError(
        f"{path} is damaged or no comparison; name a comparison.json, or make it again with `buddy compare`."
    )


def join(records: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """One record of all routers and runs, in the order of the files.

    Times of several records were not measured in turn with each other, so they are left out where more than one has
    some. Static and random routers depend on no estimator of gradients, so a record of these alone may have another.

    Args:
        records: by the file that each was read from; two or more.

    Raises:
        RunError: other recipes, texts or tasks, one label for two routers, or a run that is in two of them.
    """
    first = next(iter(records.values()))
    base_path = next((path for path, record in records.items() if _has_learned(record)), next(iter(records)))
    base = records[base_path]
    known_inputs: dict[str, tuple[Path, Any]] = {}
    for path, other in records.items():
        _check_comparable(base_path, base, path, other)
        for name, digest in other.get("inputs", {}).items():  # older files lack some
            there, known = known_inputs.setdefault(name, (path, digest))
            if known != digest:
                raise _not_joined(there, path, f"the {name}")
    routers: dict[str, tuple[Path, Any]] = {}
    runs: dict[tuple[str, int], tuple[Path, Any]] = {}
    for path, record in records.items():
        for router in record["routers"]:
            there, known = routers.setdefault(router["label"], (path, router))
            if known != router:
                raise RunError(
                    f"{there} and {path} call different routers {router['label']}; compare them in one folder instead."
                )
        for run in record["runs"]:
            there, known = runs.setdefault((run["router"], run["seed"]), (path, run))
            if known is not run:
                name = f"{run['router']}, seed {run['seed']}"
                raise RunError(f"The run {name} is in {there} and in {path}; leave one of the files out.")
    order = {label: place for place, label in enumerate(routers)}
    timed = [record["speed"] for record in records.values() if record.get("speed")]
    failures = {(each["router"], each["seed"]): each for record in records.values() for each in record["failures"]}
    recipe, fixed = base["recipe"], {each["recipe"].get("fixed", "null") for each in records.values()}
    return {
        **first,
        "recipe": recipe if len(fixed) == 1 else recipe | {"fixed": "null"},
        "routers": [router for _, router in routers.values()],
        "runs": [runs[key][1] for key in sorted(runs, key=lambda key: (order[key[0]], key[1]))],
        "speed": timed[0] if len(timed) == 1 else None,
        "failures": [each for key, each in failures.items() if key not in runs],
        "parts": [{key: each[key] for key in PROVENANCE} for each in records.values()],
    }


# Texts without the folders of this machine


def _shown_text(text: str) -> str:
    """The last part of a path; in other text, such as an override or a list, of each path in it."""
    key, equals, value = text.partition("=")
    if equals and os.path.exists(value):
        return f"{key}={shown_path(value)}"
    return shown_path(text) if os.path.exists(text) else "".join(map(shown_path, re.split(r"([],=[{} ])", text)))


def shown_path(text: str) -> str:
    """The last part of a path; other text, such as a name on the hub, unchanged."""
    is_path = os.sep in text and (text.startswith((os.sep, ".", "~")) or os.path.exists(text))
    return Path(text).name if is_path else text


def shown_command(arguments: Iterable[str]) -> str:
    """A command line without the folders of files."""
    return " ".join(shlex.quote(_shown_text(argument)) for argument in arguments)


def _router_entry(label: str, folder: Path) -> dict[str, Any]:
    section = read_run(folder).recipe.router
    cls = load(section.name)
    return {
        "label": label,
        "folder": folder.parent.name,
        "name": section.name,
        "options": dict(section.options),
        "kind": cls.kind,
        "source": cls.source,
        "full_depth": cls.full_depth,
    }


def _run_entry(label: str, folder: Path, texts: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, Any]:
    found = {each["label"]: read_json(evaluation_file(folder, each["label"], each["own"])) for each in texts}
    return {
        "router": label,
        "seed": read_run(folder).recipe.seed,
        "fit": read_metrics(folder)["fit"],
        "domains": {text: {"results": each["results"], "documents": each["documents"]} for text, each in found.items()},
        "tasks": [entry for name in tasks for entry in read_json(task_file(folder, name))["results"]],
    }


def _has_learned(record: Mapping[str, Any]) -> bool:
    return any(router["kind"] == "learned" for router in record["routers"])


def _with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A flat recipe with the keys that an older Buddy did not have, and today's names of those that it had."""
    renamed = {RENAMED.get(key, key): value for key, value in recipe.items()}
    sections = {key.partition(".")[0] for key in renamed if "." in key}
    known = {key: value for key, value in flatten(COMPLETE).items() if key.partition(".")[0] in sections}
    return flatten(Recipe()) | known | renamed


def _check_comparable(path: Path, one: Mapping[str, Any], other_path: Path, other: Mapping[str, Any]) -> None:
    """Raises RunError unless recipes, texts, layers and tasks are the same."""
    here, there = (_with_defaults(each["recipe"]) for each in (one, other))
    own = MAY_DIFFER if _has_learned(other) else (*MAY_DIFFER, *ESTIMATOR_KEYS)
    differing = [
        f"{key}: {here.get(key, 'not set')} and {there.get(key, 'not set')}"
        for key in dict.fromkeys([*here, *there])
        if not key.startswith(own) and here.get(key) != there.get(key)
    ]
    texts, others = ({each["label"]: each.get("fingerprint") for each in record["domains"]} for record in (one, other))
    differing += [
        f"the text {label}" for label in dict.fromkeys([*texts, *others]) if texts.get(label) != others.get(label)
    ]
    differing += [key for key in ("layers", "tasks") if one.get(key) != other.get(key)]
    if differing:
        raise _not_joined(path, other_path, "; ".join(differing))


def _not_joined(path: Path, other: Path, differing: str) -> RunError:
    return RunError(
        f"{path} and {other} were made differently ({differing}) and cannot be joined; make one of them again with the "
        "settings of the other."
    )
