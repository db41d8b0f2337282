"""`python -m studies.calibration_benchmark`: a greedy search through `Probe.losses` against the naive way.

The search removes in each round the layer whose absence costs the calibration windows least (SLEB, 2402.09025, section
3). The naive way runs each candidate alone: a forward of a stock model whose layers were physically removed, and the
same cross-entropy. Both run the same candidates, in turn round by round, in the same batches and without sinks, which
a pruned model does not have. Nothing is measured beforehand; the probe writes to a store in a temporary folder.

The memory for states that the probe keeps from round to round is fixed (2 GiB), so few windows favour it a little, and
the first rounds are slower than the later ones.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import PreTrainedModel

from buddy.builders.data import build_data
from buddy.builders.model import build_backbone, build_model
from buddy.calibration.probe import CalibrationProbe
from buddy.config import load_recipe
from buddy.console import print_titled_table, stderr, stdout, track
from buddy.engine.shared_weights import pruned_model
from buddy.losses import cross_entropy


@dataclass
class Clock:
    """Seconds of wall time and of processor time, one entry for each round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    def time(self, work: Callable[[], Tensor]) -> Tensor:
        """The work's result, its time noted."""
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)
        return result


@dataclass(frozen=True)
class Round:
    """One round of both searches: what each would remove, and how far their losses are apart, in nats."""

    naive: int
    shared: int
    apart: float


@torch.no_grad()
def naive_losses(models: list[PreTrainedModel], batches: tuple[Tensor, ...]) -> Tensor:
    """(P, N) float64: mean cross-entropy of each window (N, T) by each of P pruned models."""
    return torch.stack([torch.cat([_cross_entropy(model, batch) for batch in batches]) for model in models])


def _cross_entropy(model: PreTrainedModel, batch: Tensor) -> Tensor:
    batch = batch.to(model.device)
    logits = model(batch, use_cache=False).logits
    tokens = cross_entropy(logits, batch.roll(-1, 1))  # of all positions: to leave one out would copy the logits
    return tokens[:, :-1].double().mean(1).cpu()


def search(
    probe: CalibrationProbe, batches: tuple[Tensor, ...], removals: int, clocks: tuple[Clock, Clock]
) -> Iterator[Round]:
    """Remove layers greedily, each round timed both ways; the naive way's choice is the one that holds."""
    removed: list[int] = []
    for turn in track(range(removals), "Rounds"):
        candidates = [index for index in range(probe.geometry.routable) if index not in removed]
        plans = torch.stack([probe.plan_without([*removed, index]) for index in candidates])
        whole = probe.routed.backbone.model
        models = [pruned_model(whole, plan.nonzero()[:, 0].tolist()) for plan in plans]  # before the clock starts
        ways = [partial(naive_losses, models, batches), partial(probe.losses, plans)]
        order = (0, 1) if turn % 2 else (1, 0)
        done = {way: clocks[way].time(ways[way]) for way in order}
        naive, shared = (candidates[int(done[way].mean(1).argmin())] for way in (0, 1))
        removed.append(naive)
        yield Round(naive, shared, float((done[0] - done[1]).abs().max()))


def show(rounds: list[Round], clocks: tuple[Clock, Clock], size: str) -> None:
    """The table, the ratio, and whether both ways agree."""
    title = f"{len(rounds)} rounds on {size}, threads: {torch.get_num_threads()}"
    totals = [(sum(clock.wall), sum(clock.processor)) for clock in clocks]
    rows = [
        (name, *(f"{seconds:.1f}" for seconds in total))
        for name, total in zip(("naive", "Probe.losses"), totals, strict=True)
    ]
    rows.append(("ratio", *(f"{naive / shared:.2f}" for naive, shared in zip(*totals, strict=True))))
    print_titled_table(title, ["seconds", "wall", "processor"], rows)
    stdout.print(
        "ratio by round (wall):", *(f"{a / b:.2f}" for a, b in zip(clocks[0].wall, clocks[1].wall, strict=True))
    )
    stdout.print("removed, naive: ", *(each.naive for each in rounds))
    stdout.print("removed, shared:", *(each.shared for each in rounds))
    stdout.print(f"losses of one window apart by at most {max(each.apart for each in rounds):.1e} nats")
    stderr.print("Expected: a ratio of at least 1.5, and the same removals.")


def main(
    backbone: Annotated[str, typer.Option(help="The model's name or folder.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a forward, both ways.")] = 4,
    to: Annotated[int, typer.Option(min=2, help="Executed layers at the end.")] = 15,
    rounds: Annotated[int | None, typer.Option(min=1, help="Stop after so many removals.")] = None,
) -> None:
    """Time the greedy removal of layers through the probe against running each candidate by itself."""
    sizes = {"window": tokens, "prompt": 1, "batch_size": batch_size, "calibration_windows": windows}
    overrides = [f"backbone.name={backbone}", f"backbone.dtype={dtype}", "router=uniform", "rivals=[]"]
    overrides += ["routing.sink_tokens=0", *(f"data.{name}={value}" for name, value in sizes.items())]
    recipe = load_recipe("quickstart", overrides)
    model = build_backbone(recipe)
    data = build_data(recipe, model)
    data.setup()
    routed, ids = build_model(recipe, model), data.calibration.input_ids
    removals = model.num_layers - max(to, routed.geometry.always_on)
    clocks = Clock(), Clock()
    with tempfile.TemporaryDirectory() as folder:
        probe = CalibrationProbe(routed, ids, batch_size, store=Path(folder))
        turns = list(search(probe, ids.split(batch_size), min(removals, rounds or removals), clocks))
    show(turns, clocks, f"{len(ids)} × {tokens} tokens, {backbone} in {dtype}")


if __name__ == "__main__":
    typer.run(main)
