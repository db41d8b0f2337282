"""A command that is killed at random moments and repeated until it ends gives what an undisturbed one gives."""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from buddy.backbone import embedded
from buddy.config import load_recipe
from buddy.io import load_tensors, read_json
from buddy.run import read_run
from tests.small import Small, write_text
from tests.tiny import tiny_folder

FIT = ["trainer.max_steps=40", "checkpoint_every=4", "router.options.prior=none", "rivals=[shortgpt]"]
UNEQUAL = {"seconds", "created", "checksum", "checksums", "command", "machine", "versions", "output"}  # keys of JSON
PERMANENT = (".lock",)  # ends of hidden files that may stay


@dataclass(frozen=True)
class Job:
    """A piece of work that is killed.

    Attributes:
        name: of the job.
        work: does it in a folder; called again there, it goes on.
        before: what lies in the folder when a round begins; called once a round in the folder.
    """

    name: str
    work: Callable[[Path], None]
    before: Callable[[Path], None] = lambda folder: None


@dataclass
class Tally:
    """Kills and finished rounds of a job, and by how far it had come how often it was killed."""

    kills: int = 0
    rounds: int = 0
    moments: Counter[str] = field(default_factory=Counter)


class Died(Exception):
    """A process ended by itself with an error; the message is its output."""


def soak(job: Job, folder: Path, kills: int, seed: int) -> Tally:
    """Kill a job so many times, in as many rounds as that takes.

    Raises:
        AssertionError: a file was corrupt, a result different, or something was left over.
        Died: the job ended with an error.
    """
    draw, tally = random.Random(f"{seed} {job.name}"), Tally()
    results = []
    for name in ("undisturbed", "undisturbed again"):  # the first one loads what is slow to load
        start = time.monotonic()
        _begin(job, folder / name)
        assert _ends(job, folder / name)
        results.append(_result(folder / name))
    seconds, expected = time.monotonic() - start, results[0]
    assert expected, "the job has no result"
    assert results[1] == expected, "two undisturbed rounds differ"
    while tally.kills < kills:
        place = folder / f"round {tally.rounds}"
        _begin(job, place)
        while not _ends(job, place, draw.uniform(0, seconds) if tally.kills < kills else None):
            tally.kills += 1
            tally.moments[_check(place)] += 1
        assert not (names := _differing(_result(place), expected)), (
            f"{place} differs from an undisturbed round: {names}"
        )
        assert not _leftovers(place), f"{place} has {_leftovers(place)} left over"
        shutil.rmtree(place)
        tally.rounds += 1
    return tally


def _begin(job: Job, place: Path) -> None:
    (place / "tmp").mkdir(parents=True)
    job.before(place)


def _ends(job: Job, place: Path, seconds: float | None = None) -> bool:
    """Do the job in a process of its own; False where it was killed after so many seconds, None for never."""
    log = place.parent / "log"
    pid = os.fork()
    if not pid:
        _child(job, place, log)
    handle = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([handle], [], [], seconds)
        if not ended:
            os.kill(pid, signal.SIGKILL)
    finally:
        os.close(handle)
        _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise Died(log.read_text(errors="replace")[-4000:])
    return True


def _child(job: Job, place: Path, log: Path) -> None:
    """Never returns."""
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        tempfile.tempdir = str(place / "tmp")
        job.work(place)
        code = 0
    except SystemExit as end:
        code = 0 if end.code in (None, 0) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _check(place: Path) -> str:
    """Fails where a kill left a corrupt file; how far the job had come."""
    steps = [torch.load(path, weights_only=True)["global_step"] for path in place.rglob("last.ckpt")]
    complete = [read_run(path.parent) for path in place.rglob("metrics.json")]  # checks the sums
    for path in place.rglob("*.json"):
        read_json(path)
    for path in place.rglob("*.safetensors"):
        load_tensors(path)
    for path in place.rglob("recipe.yaml"):
        load_recipe(path, saved=True)
    return f"{len(complete)} complete" if complete else "in training" if any(steps) else "before a checkpoint"


def _result(place: Path) -> dict[str, Any]:
    """All tensors and JSON values in a folder but those that say when and where; what must be equal to the bit."""
    found: dict[str, Any] = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.suffix == ".safetensors":
            tensors = load_tensors(path)
            found[name] = {key: (str(value.dtype), value.tolist()) for key, value in tensors.items()}
        elif path.suffix == ".json" and path.name != embedded.RECORD:
            found[name] = _timeless(json.loads(path.read_text()), str(place))
    return found


def _differing(one: Any, other: Any, name: str = "") -> list[str]:
    """Names of all values that are not in both, or not equal."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [name]
    missing = object()
    keys = sorted(one.keys() | other.keys())
    return [each for k in keys for each in _differing(one.get(k, missing), other.get(k, missing), f"{name}/{k}")]


def _timeless(value: Any, place: str) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(each, place) for key, each in value.items() if key not in UNEQUAL}
    if isinstance(value, list):
        return [_timeless(each, place) for each in value]
    return value.replace(place, "") if isinstance(value, str) else value


def _leftovers(place: Path) -> list[str]:
    """Temporary files, and hidden ones that should not be there once the job has finished."""
    found = [*(place / "tmp").rglob("*"), *place.rglob(".*")]
    return sorted(str(path.relative_to(place)) for path in found if not path.name.endswith(PERMANENT))


# What is killed


def jobs(work: Path) -> list[Job]:
    """Everything in Buddy that takes long, on a tiny model."""
    small = Small(work, tiny_folder(work / "model"), write_text(work / "text.jsonl"))
    more = write_text(work / "more.jsonl", 24, seed=5)
    fit = ["fit", "--recipe", str(small.file), *FIT]
    compare = ["compare", "--recipe", str(small.file), "--routers", "buddy,shortgpt", "--seeds", "2", "--no-speed"]
    compare += ["--domains", str(more), "router.options.prior=none", "trainer.max_steps=8", "checkpoint_every=2"]
    search = ["fit", "--recipe", str(small.file), "router=sleb", "rivals=[]", "data.calibration_windows=12"]
    older = work / "older"
    run = older / "small" / "buddy" / "seed-0"

    def refit(folder: Path) -> None:
        _buddy([*fit, f"output={folder}/runs"])

    def complete(folder: Path) -> None:
        """A complete run of another recipe, which is to be replaced."""
        if not older.exists():
            assert _ends(
                Job("", lambda _: _buddy([*fit, "rivals=[]", "data.test_windows=4", f"output={older}"])), folder
            )
        shutil.copytree(run, folder / "runs" / "small" / "buddy" / "seed-0")

    def export(folder: Path) -> None:
        if not (folder / "cut").exists():
            _buddy(["export", "--run", str(run), "--budget", "0.5", "--out", f"{folder}/cut", "--no-check"])

    return [
        Job("fit", refit, complete),
        Job("calibration", lambda folder: _buddy([*search, f"output={folder}/runs"])),
        Job("compare", lambda folder: _buddy([*compare, "--out", f"{folder}/compared"])),
        Job("export", export, lambda folder: complete(folder) or shutil.rmtree(folder / "runs")),
        Job("conversion", _convert),
    ]


def _buddy(words: list[str]) -> None:
    from buddy.cli import app

    app(words)


def _convert(folder: Path) -> None:
    """The embedded model's conversion, with a tiny model in place of the real one."""

    def write(model: embedded.Embedded, parts: list[Path], target: Path) -> None:
        tiny_folder(target)

    embedded._write_model = write  # type: ignore[assignment]
    embedded._wheel_files = lambda model: [Path("model.gguf")]  # type: ignore[assignment]
    os.environ["BUDDY_CACHE"] = str(folder / "cache")
    embedded.model_folder(embedded.MODELS[0])
