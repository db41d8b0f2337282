"""Several records as one: a comparison whose runs were made in several folders, or on several machines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from buddy.errors import RunError

# Keys that change nothing in a run; those of trainer are Buddy 0.1's.
FREE = ("output", "rivals", "ckpt_path", "checkpoint_every", "logger", "trainer.ckpt_path", "trainer.checkpoint_every")
MADE = ("command", "created", "versions", "machine")  # how each part was made
RATES = "adapter.rates"  # of healing, of which each run keeps the best: kept with each part and told, not compared
OWN = ("router.", "seed", RATES, *FREE)  # beginnings of keys that say which runs were asked for, and nothing of how

Held = tuple[Path, Mapping[str, Any]]  # an entry and the file that it is in


def joined(records: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """One record of all routers and runs, in the order of the files.

    Times were not measured in turn with each other, so that those of several records are left out.

    Args:
        records: by the file that each was read from; one or more.

    Raises:
        RunError: other recipes, texts or tasks, one name for two routers, or a run that is in two of them.
    """
    paths, found = list(records), list(records.values())
    if len(found) == 1:
        return dict(found[0])
    for path in paths[1:]:
        _check(paths[0], records[paths[0]], path, records[path])
    routers = _unique(
        ((path, each["label"], each) for path in paths for each in records[path]["routers"]), _same_router
    )
    runs = _unique(
        ((path, f"{each['router']}, seed {each['seed']}", each) for path in paths for each in records[path]["runs"]),
        _twice,
    )
    order = {label: place for place, label in enumerate(routers)}
    return {
        **found[0],
        "routers": list(routers.values()),
        "runs": sorted(runs.values(), key=lambda run: (order[run["router"]], run["seed"])),
        "speed": None,
        "failures": [
            each
            for one in found
            for each in one["failures"]
            if f"{each['router']}, seed {each['seed']}" not in runs  # which another part has
        ],
        "parts": [{key: each[key] for key in MADE} | {"rates": each["recipe"].get(RATES)} for each in found],
    }


def _check(path: Path, one: Mapping[str, Any], other_path: Path, other: Mapping[str, Any]) -> None:
    """Raises RunError unless both were made alike."""
    here, there = one["recipe"], other["recipe"]
    differing = [
        f"{key}: {here.get(key, 'not set')} and {there.get(key, 'not set')}"
        for key in dict.fromkeys([*here, *there])
        if not key.startswith(OWN) and here.get(key) != there.get(key)
    ]
    texts, others = ({each["label"]: each.get("fingerprint") for each in record["domains"]} for record in (one, other))
    differing += [
        f"the text {label}" for label in dict.fromkeys([*texts, *others]) if texts.get(label) != others.get(label)
    ]
    differing += [key for key in ("layers", "tasks") if one.get(key) != other.get(key)]
    if differing:
        raise RunError(
            f"{path} and {other_path} were made differently ({'; '.join(differing)}) and cannot stand in one "
            "comparison; make one of them again as the other was made."
        )


def _unique(
    entries: Iterable[tuple[Path, str, Mapping[str, Any]]], again: Callable[[str, Held, Held], None]
) -> dict[str, Mapping[str, Any]]:
    """Entries by name; `again` says what is wrong with one of a name that was there before."""
    held: dict[str, Held] = {}
    for path, name, entry in entries:
        before = held.setdefault(name, (path, entry))
        if before[1] is not entry:
            again(name, before, (path, entry))
    return {name: entry for name, (_, entry) in held.items()}


def _same_router(label: str, one: Held, other: Held) -> None:
    if one[1] != other[1]:
        raise RunError(f"{one[0]} and {other[0]} call different routers {label}; compare them in one folder instead.")


def _twice(run: str, one: Held, other: Held) -> None:
    raise RunError(f"The run {run} is in {one[0]} and in {other[0]}; leave one of the files out.")
