"""comparison.csv: one line for each run, text and budget."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from buddy.comparison.view import Comparison

HEAD = (
    "router",
    "kind",
    "seed",
    "domain",
    "budget",
    "layers",
    "perplexity",
    "interval_low",
    "interval_high",
    "kl",
    "executed_min",
    "executed_mean",
    "executed_max",
    "documents",
    "tokens",
    "fit_seconds",
    "parameters",
    "decode_tokens_per_second",
    "prefill_tokens_per_second",
)


def as_csv(comparison: Comparison) -> str:
    """All results in long form, numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEAD)
    for label in comparison.labels:
        for run in comparison.runs(label):
            writer.writerows(_lines(comparison, label, run))
    return text.getvalue()


def _lines(c: Comparison, label: str, run: Any) -> Iterator[tuple[Any, ...]]:
    """Speed was measured once for a router and is repeated for its seeds; it is empty where it was not measured."""
    who, cost = (label, c.routers[label]["kind"], run["seed"]), (run["fit"]["seconds"], run["fit"]["parameters"])
    for domain in c.domains:
        for entry in run["domains"][domain]["results"]:
            times = c.speed(label, entry["layers"])
            speed = _per_second(c, times) if times else ("", "")
            executed = (entry["executed"][name] for name in ("min", "mean", "max"))
            quality = (entry["perplexity"], *entry["interval"], entry["kl"], *executed)
            counts = (entry["documents"], entry["tokens"])
            yield (*who, domain, entry["budget"], entry["layers"], *quality, *counts, *cost, *speed)


def _per_second(c: Comparison, times: Any) -> tuple[float, float]:
    return 1e3 / times["decode_ms"], 1e3 * c.record["speed"]["tokens"] / times["prefill_ms"]
