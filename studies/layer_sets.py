"""KL to the dense model of fixed sets of removed layers, with a bridge in each, on calibration windows.

`python -m studies.layer_sets RUN --lengths 4 8 11 15 --sets 14-17 4-7,12-18`

First every block of so many consecutive layers, the best of each length marked; then the given sets. Layers are counted
from 0. The bridges of a set are fitted on the last 24 calibration windows of the run's recipe.
"""

import argparse
from pathlib import Path

import torch

from buddy.builders.data import build_held_out
from buddy.builders.model import load_model
from buddy.calibration.probe import CalibrationProbe
from buddy.io import keep_freed_memory
from buddy.run import read_run


def layers_of(text: str) -> list[int]:
    """ "4-7,12" as [4, 5, 6, 7, 12]."""
    ends = [part.split("-") for part in text.split(",")]
    return [layer for part in ends for layer in range(int(part[0]), int(part[-1]) + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run whose recipe has bridges")
    parser.add_argument("--lengths", type=int, nargs="*", default=[])
    parser.add_argument("--sets", nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=12)
    asked = parser.parse_args()
    keep_freed_memory()
    run = read_run(asked.run)
    model, bridge = load_model(run), run.recipe.bridge
    if bridge is None:
        parser.error(f"{asked.run} has no bridges; give a run whose recipe has them")
    model.bridge(None)
    windows = build_held_out(run.recipe, model.backbone, calibration=True).calibration.input_ids
    settings = {"rank": bridge.rank, "ridge": bridge.ridge}
    probe = CalibrationProbe(model, windows, 1, prompt=run.recipe.data.prompt, bridge=settings)
    first, end = probe.geometry.context_layer, probe.geometry.context_layer + probe.geometry.routable

    def measured(sets: list[list[int]]) -> list[float]:
        runs = torch.stack([probe.plan_without([layer - first for layer in layers]) for layers in sets])
        return probe.losses(runs, "kl", asked.windows, bridged=True).mean(1).tolist()

    for length in asked.lengths:
        starts = range(first, end - length + 1)
        values = measured([list(range(start, start + length)) for start in starts])
        for start, value in zip(starts, values, strict=True):
            best = "  best" if value == min(values) else ""
            print(f"{start}-{start + length - 1}  {value:.3f}{best}", flush=True)
    for name in asked.sets:
        print(f"{name}  {measured([layers_of(name)])[0]:.3f}", flush=True)


if __name__ == "__main__":
    main()
