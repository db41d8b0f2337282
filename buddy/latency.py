"""Milliseconds per generated token on this machine at each number of layers, measured once and stored.

Budgets such as 15ms resolve by this table. Decode time is nearly affine in the number of layers, so a few numbers are
timed, in turns so that a drift of the machine affects all of them, and the others are interpolated.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from buddy.console import Track, tracker
from buddy.engine.model import RoutedLM
from buddy.measurements import Measurements
from buddy.metrics.timing import PROMPT, BenchmarkCase, decode_interleaved
from buddy.provenance import machine

LOCK, TABLE = "measuring.lock", "milliseconds"
LAYOUT = 2  # raise it when tokens are timed differently: older tables are then not found
POINTS, ROUNDS = 5, 5
STEPS = 16  # timed tokens
# A natural text, so that plans change as often as in use.
TEXT = (
    "A river that runs to the sea does not ask at each stone which way is down. It takes the way that is open, and "
    "where two are open it takes both, and the deeper one keeps the water in the dry months. Those who live by it "
    "learn its habits: when it rises, which meadow it floods first, where the ice is thin in March. "
)


class LatencyTable:
    """Milliseconds per token of one model at each K, stored or measured on first use.

    Args:
        folder: of the stored tables; None keeps this one in memory only.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._tables: dict[int, dict[int, float]] = {}

    def __call__(self, routed: RoutedLM, texts: int = 1) -> dict[int, float]:
        """K → milliseconds, for every K of a budget, where so many texts are decoded in one batch."""
        if texts not in self._tables:
            self._tables[texts] = interpolated(self._points(routed, texts))
        return self._tables[texts]

    def remeasure(self, routed: RoutedLM, rounds: int = ROUNDS) -> dict[int, float]:
        """Measure again and replace the stored table; returns the measured points, K → milliseconds."""
        points = self._points(routed, 1, rounds)
        self._tables[1] = interpolated(points)
        return points

    def _points(self, routed: RoutedLM, texts: int, rounds: int | None = None) -> dict[int, float]:
        """Milliseconds at `points_of`: stored ones, or measured where there are none or a number of rounds is given."""
        kept = Measurements(self._folder, timing_setting(routed, texts))
        if rounds or kept.missing([TABLE]):
            with self._lock():
                if rounds or kept.missing([TABLE]):  # another process may have measured it meanwhile
                    counts = points_of(routed)
                    span = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
                    track = tracker(f"Timing {'tokens' if texts == 1 else f'{texts} texts'} at {span} layers")
                    points = measure_latencies(routed, rounds or ROUNDS, track, texts)
                    kept[TABLE] = torch.tensor([*points.items()], dtype=torch.float64)
                    kept.save()
        return {int(count): spent for count, spent in kept[TABLE].tolist()}

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Excludes other measurements, of any model, which would slow this one."""
        with ExitStack() as stack:
            if self._folder is not None:
                with suppress(OSError):  # storing reports a folder that cannot be written
                    self._folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(FileLock(self._folder / LOCK))
            yield


@torch.no_grad()
def measure_latencies(routed: RoutedLM, rounds: int = ROUNDS, track: Track = iter, texts: int = 1) -> dict[int, float]:
    """Median milliseconds of a decode step at a few K, with the adapter off, as if it were merged.

    Args:
        routed: the model.
        rounds: timings of each K, after one warm-up round.
        track: wraps the rounds to show progress.
        texts: rows of the batch.
    """
    counts, ids, model = points_of(routed), _texts(routed, texts), routed.backbone.model
    cases = [BenchmarkCase("routed", count, model, partial(routed.at, executed=[count])) for count in counts]
    draw, start = random.Random(0), ids.shape[1] - STEPS
    with routed.unadapted(), routed.changed(mean_over=1):  # K is then what each token runs, not a mean over tokens
        times = [decode_interleaved(cases, ids, start, draw) for _ in track(range(rounds + 1))]
    rounds_of_each = zip(*times[1:], strict=True)
    medians = (statistics.median(each.milliseconds for each in means) for means in rounds_of_each)
    return dict(zip(counts, medians, strict=True))


def interpolated(points: Mapping[int, float]) -> dict[int, float]:
    """Milliseconds at every K between the smallest and the largest, linear between points.

    More layers never take less time: a smaller value, which is noise, is replaced by the one before.
    """
    counts = sorted(points)
    values = np.maximum.accumulate([points[count] for count in counts])
    every = range(counts[0], counts[-1] + 1)
    return dict(zip(every, np.interp(every, counts, values).tolist(), strict=True))


def points_of(routed: RoutedLM) -> list[int]:
    """The K to time: evenly spaced from the always-on layers to full depth."""
    layers, least = routed.geometry.layers, routed.geometry.always_on
    if routed.router.full_depth:
        return [layers]
    return sorted({round(least + (layers - least) * place / (POINTS - 1)) for place in range(POINTS)})


def timing_setting(routed: RoutedLM, texts: int = 1) -> dict[str, Any]:
    """All that the time of a token depends on, except other load on the machine."""
    backbone, here = routed.backbone, machine()
    routing = asdict(routed.settings)
    if texts == 1:
        routing["batch_plan"] = "row"  # alone, a text shares no plan
    added = 0 if routed.adapter is None else routed.adapter.size
    return {
        "layout": LAYOUT,
        "processor": here["processor"],
        "accelerator": here["accelerator"] if backbone.device.type != "cpu" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "backbone": backbone.fingerprint,
        "parameters": backbone.model.num_parameters() - added,  # equal for a merged and an unmerged adapter
        "dtype": str(backbone.dtype),
        "attention": backbone.model.config._attn_implementation,
        "router": type(routed.router).__name__,
        "router_parameters": sum(parameter.numel() for parameter in routed.router.parameters()),
        "bridge_rank": None if routed.bridges is None else routed.bridges.rank,
        "routing": routing,
        **({} if texts == 1 else {"texts": texts}),
    }


def _texts(routed: RoutedLM, texts: int) -> Tensor:
    """(texts, T) long: prompts and the `STEPS` timed tokens; each row begins at another place, as its plans do."""
    tokens = routed.backbone.tokenizer(TEXT, add_special_tokens=False).input_ids
    length = min(PROMPT + STEPS, routed.backbone.context_length)
    row = torch.tensor((tokens * length)[:length], device=routed.backbone.device)
    return torch.stack([row.roll(-7 * number) for number in range(texts)])
