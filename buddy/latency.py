"""What a generated token takes on this machine at each number of layers: measured once, and kept in the user's cache.

A budget such as 15ms is looked up here. Decode time is close to affine in the layers that run, so a few numbers of
layers are timed, in turns so that a drift of the machine meets them all, and what lies between is interpolated.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from buddy.console import errors, tracker
from buddy.engine.model import RoutedLM
from buddy.errors import RunError
from buddy.io import read_json, write_json
from buddy.scoring.timing import Contender, decode_in_turn, machine

LOCK = "measuring.lock"
LAYOUT = 2  # raise it when tokens are timed in another way: older tables are then not found
POINTS, ROUNDS = 5, 5
PROMPT, STEPS = 64, 16  # tokens before those that are timed, and their number
# Any text will do; a real one changes plans as often as text does.
TEXT = (
    "A river that runs to the sea does not ask at each stone which way is down. It takes the way that is open, and "
    "where two are open it takes both, and the deeper one keeps the water in the dry months. Those who live by it "
    "learn its habits: when it rises, which meadow it floods first, where the ice is thin in March. "
)
Track = Callable[[Sequence[Any]], Iterable[Any]]


class Latencies:
    """Milliseconds a token of one model at every K; measured on first use, unless an earlier process did so.

    Args:
        folder: where tables are kept; None keeps this one in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._table: dict[int, float] | None = None

    def __call__(self, routed: RoutedLM) -> dict[int, float]:
        """The table, K → milliseconds, for every K that can be asked for."""
        if self._table is None:
            self._table = interpolated(self._points(routed, ROUNDS, fresh=False))
        return self._table

    def remeasure(self, routed: RoutedLM, rounds: int = ROUNDS) -> dict[int, float]:
        """Measure anew and keep it in place of an older table; what was measured, K → milliseconds."""
        points = self._points(routed, rounds, fresh=True)
        self._table = interpolated(points)
        return points

    def _points(self, routed: RoutedLM, rounds: int, fresh: bool) -> dict[int, float]:
        setting = setting_of(routed)
        path = None if self._folder is None else self._folder / f"{_digest(setting)}.json"
        found = None if fresh else _read(path, setting)  # without waiting for somebody who measures another model
        if found is not None:
            return found
        with self._locked() as kept:
            found = None if fresh else _read(path, setting)  # another process may just have done it
            if found is not None:
                return found
            if path is not None and not fresh and os.path.exists(path):
                errors.print(f"The table of latencies {path} cannot be used; measuring anew.", soft_wrap=True)
            found = measure(routed, rounds, tracker(f"Timing tokens at {_span(routed)} layers"))
            if kept:
                _write(path, setting, found, rounds)
        return found

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """While nobody else measures, whatever the model: they would slow each other down. Whether tables are kept."""
        if self._folder is None:
            yield False
            return
        lock = FileLock(self._folder / LOCK)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError as error:
            errors.print(f"Latencies cannot be kept in {self._folder} ({error.strerror or error}).", soft_wrap=True)
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


@torch.no_grad()
def measure(routed: RoutedLM, rounds: int = ROUNDS, track: Track = iter) -> dict[int, float]:
    """Median milliseconds a decode step at a few K, batch 1, with an adapter off: a run is served with it merged.

    Args:
        routed: the model.
        rounds: each K is timed once in each, after one round that is not counted.
        track: wraps the rounds to show progress.
    """
    counts, ids, model = points_of(routed), _text(routed), routed.backbone.model
    alone = nullcontext() if routed.adapter is None else routed.adapter.off()
    spends = [lambda count=count: routed.at(executed=[count]) for count in counts]
    field = [Contender("routed", count, model, each) for count, each in zip(counts, spends, strict=True)]
    draw, start = random.Random(0), ids.shape[1] - STEPS
    with alone:
        spent = [decode_in_turn(field, ids, start, draw) for _ in track(range(rounds + 1))]
    return {count: statistics.median(each) for count, each in zip(counts, zip(*spent[1:], strict=True), strict=True)}


def interpolated(points: Mapping[int, float]) -> dict[int, float]:
    """Milliseconds at every K between the least and the most, linear between points.

    More layers never take less: where noise says so, the point before holds.
    """
    counts = sorted(points)
    values = np.maximum.accumulate([points[count] for count in counts])
    every = range(counts[0], counts[-1] + 1)
    return dict(zip(every, np.interp(every, counts, values).tolist(), strict=True))


def points_of(routed: RoutedLM) -> list[int]:
    """The K's to be timed: evenly spaced from the layers that always run to full depth."""
    layers, least = routed.geometry.layers, routed.geometry.always_on
    if routed.router.full_depth:
        return [layers]
    return sorted({round(least + (layers - least) * place / (POINTS - 1)) for place in range(POINTS)})


def setting_of(routed: RoutedLM) -> dict[str, Any]:
    """All that the time of a token depends on, but for what else the machine does."""
    backbone, here = routed.backbone, machine()
    beside = 0 if routed.adapter is None else routed.adapter.size
    return {
        "layout": LAYOUT,
        "processor": here["processor"],
        "accelerator": here["accelerator"] if backbone.device.type != "cpu" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backbone": backbone.fingerprint,
        "parameters": backbone.model.num_parameters() - beside,  # the same whether an adapter is merged or beside
        "dtype": str(backbone.dtype),
        "attention": backbone.model.config._attn_implementation,
        "router": type(routed.router).__name__,
        "router_parameters": sum(parameter.numel() for parameter in routed.router.parameters()),
        "routing": asdict(routed.settings) | {"policy": routed.policy.name, "pool": routed.pool},
    }


def _text(routed: RoutedLM) -> Tensor:
    """(1, T) long: what is read, and the tokens that are timed at its end."""
    tokens = routed.backbone.tokenizer(TEXT, add_special_tokens=False).input_ids
    length = min(PROMPT + STEPS, routed.backbone.context_length)
    return torch.tensor([(tokens * length)[:length]], device=routed.backbone.device)


def _span(routed: RoutedLM) -> str:
    counts = points_of(routed)
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])


def _digest(setting: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:20]


def _read(path: Path | None, setting: Mapping[str, Any]) -> dict[int, float] | None:
    """The points in a file, or None where there is none that can be used."""
    if path is None or not os.path.exists(path):
        return None
    try:
        saved = read_json(path)
        points = {int(count): float(taken) for count, taken in saved["milliseconds"].items()}
        if saved["setting"] == json.loads(json.dumps(setting)) and points and min(points.values()) > 0:
            return points
    except (RunError, KeyError, TypeError, ValueError, AttributeError):
        pass
    return None


def _write(path: Path, setting: Mapping[str, Any], points: Mapping[int, float], rounds: int) -> None:
    measured = datetime.now(UTC).isoformat(timespec="seconds")
    found = {"setting": setting, "measured": measured, "rounds": rounds, "context": PROMPT, "milliseconds": points}
    try:
        write_json(path, found)
    except RunError as error:
        errors.print(f"Latencies are not kept: {error}", soft_wrap=True)
