"""A comparison for TensorBoard: a run for each router, so that curves overlay and HPARAMS has a row for each."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from buddy.comparison.view import Comparison
from buddy.evaluation.curves import Scalar, write_pictures, write_run
from buddy.io import writing
from buddy.values import shown

FOLDER, PICTURES = "tensorboard", "_figures"


def write_tensorboard(comparison: Comparison, folder: Path, pictures: Mapping[str, Path]) -> Path:
    """Write events into `<folder>/tensorboard` in place of what was there; that folder.

    Curves have executed layers as steps and the mean over seeds as values.

    Args:
        comparison: what is shown.
        folder: of the comparison.
        pictures: PNG files by name.
    """
    place, beside = folder / FOLDER, folder / f".{FOLDER}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    columns = [_column(domain, budget) for domain in comparison.domains for budget in comparison.budgets]
    for label in comparison.labels:
        run, settings = beside / comparison.routers[label]["folder"], _settings(comparison, label)
        write_run(run, _curves(comparison, label), settings, _metrics(comparison, label), {}, columns)
    write_pictures(beside / PICTURES, pictures)
    with writing(place):
        shutil.rmtree(place, ignore_errors=True)
        beside.rename(place)
    return place


def _curves(c: Comparison, label: str) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for budget, layers in sorted(c.budgets.items()):
        for domain in c.domains:
            values = c.perplexities(label, domain, budget)
            if values:
                loss, *_ = c.loss(label, domain, budget)
                for name, value in (
                    ("perplexity", sum(values) / len(values)),
                    ("loss", loss),
                    ("kl", c.kl(label, domain, budget)),
                ):
                    curves.setdefault(f"{domain}/{name}", []).append((layers, value))
        times = c.speed(label, layers) if c.scores(label, c.domains[0], budget) else None
        for name in ("decode_ms", "prefill_ms") if times else ():
            curves.setdefault(f"speed/{name}", []).append((layers, times[name]))
    return curves


def _settings(c: Comparison, label: str) -> dict[str, Scalar]:
    """The same columns for all routers."""
    router, recipe = c.routers[label], c.record["recipe"]
    shared = ("backbone.name", "data.window", "data.prompt", "data.calibration_windows", "trainer.max_steps")
    options = ", ".join(f"{key}={shown(value)}" for key, value in router["options"].items())
    own = {"router": router["name"], "options": options, "kind": router["kind"], "seeds": len(c.runs(label))}
    return own | {key: recipe[key] for key in shared}


def _metrics(c: Comparison, label: str) -> dict[str, float]:
    found = {"fit_seconds": c.fit(label, "seconds"), "fit_parameters": c.fit(label, "parameters")}
    for domain in c.domains:
        for budget in c.budgets:
            if loss := c.loss(label, domain, budget):
                found[_column(domain, budget)] = loss[0]
    return found


def _column(domain: str, budget: float) -> str:
    return f"{domain}_loss_at_{budget:g}"
