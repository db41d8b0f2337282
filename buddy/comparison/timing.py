"""What each router's plans cost in time: all in turn, in one process, once they are fitted."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buddy.backbone.load import Backbone
from buddy.build import build_model
from buddy.comparison.machine import machine, versions
from buddy.comparison.planned import Planned
from buddy.console import tracker
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError
from buddy.evaluation.pruned import pruned_model
from buddy.evaluation.speed import PROMPT, STEPS, Contender, Timings, race
from buddy.io import checksum, read_json, within_memory, write_with_checksum
from buddy.router import AnyRouter, available_budgets
from buddy.run import ROUTER, load_router

FILE, ROUNDS = "speed.json", 3
TURNS = "drawn for each token"  # of how times were taken, so that those taken otherwise are measured again
FULL = "full"


def measured(runs: Mapping[str, Planned], backbone: Backbone, windows: Tensor, folder: Path) -> dict[str, Any]:
    """Milliseconds of each router below full depth, of the engine at full depth and of the stock model.

    All take turns, in decoding token by token, so that a drift of the machine's speed meets all of them. What was
    measured for the same routers is read from the folder instead. Healed runs are timed without their adapters, since
    a model that serves has them in its weights.

    Args:
        runs: a finished run of each router, by label.
        backbone: not routed.
        windows: (N, W) long; the prefill of W tokens is timed, and the decoding of some after a short prompt.
        folder: where the times are kept.

    Returns:
        "dense" (the stock model), "full" (the engine at full depth) and, as "results", an entry for each router and K,
        each with medians over rounds and the least and most; and how it was measured.
    """
    tokens = windows.shape[1]
    made: dict[str, Any] = {label: checksum(run.folder / ROUTER) for label, run in runs.items()}
    made |= {"backbone": backbone.fingerprint, "turns": TURNS}
    made |= {"threads": torch.get_num_threads(), "device": str(backbone.device), "machine": machine(), **versions()}
    try:
        kept = read_json(folder / FILE)
        if kept["made"] == made and kept["tokens"] == tokens:
            return kept
    except (BuddyError, KeyError):  # not measured yet, or cut
        pass
    needed = max(tokens, PROMPT + STEPS)
    ids = windows.flatten().repeat(-(-needed // windows.numel()))[None, :needed].to(backbone.device)
    with within_memory(f"a prompt of {tokens} tokens", "give --no-speed"), _field(runs, backbone) as field:
        timings = race(field, ids, prompts=(tokens,), batches=(1,), rounds=ROUNDS, track=tracker("Timing, in rounds"))
    dense, full, *others = timings.items()
    found = {"made": made, "tokens": tokens, "prompt": PROMPT, "steps": STEPS, "rounds": ROUNDS}
    found |= {"threads": torch.get_num_threads(), "dense": _entry(dense[1]), "full": _entry(full[1])}
    found["results"] = [{"router": name, "layers": layers} | _entry(each) for (name, layers), each in others]
    write_with_checksum(folder / FILE, found)
    return found


@contextmanager
def _field(runs: Mapping[str, Planned], backbone: Backbone) -> Iterator[list[Contender]]:
    """The stock model; the engine at full depth, which is the same for all; each router at each K below.

    One routed model takes the routers in turn, so that a turn can be as short as a token.
    """
    routers = {label: _router(run, backbone) for label, run in runs.items()}
    layers, routed = backbone.num_layers, build_model(next(iter(runs.values())).recipe, backbone)
    try:
        field = [
            Contender("dense", layers, pruned_model(backbone.model, range(layers)), nullcontext),
            _contender(FULL, layers, routed, routed.router),
        ]
        for label, (router, counts) in routers.items():
            field += [_contender(label, count, routed, router) for count in counts if count < layers]
        yield field
    finally:
        routed.detach()


def _router(run: Planned, backbone: Backbone) -> tuple[AnyRouter, Sequence[int]]:
    """The router of a run, and K for each of its budgets, without repeats."""
    routed = build_model(run.recipe, backbone)
    try:
        routed.router.load_state_dict(load_router(run.folder))
        counts = [routed.executed_layers(budget) for budget in available_budgets(routed.router, run.recipe.budgets)]
        return routed.router.eval().requires_grad_(False), list(dict.fromkeys(counts))
    finally:
        routed.detach()


def _contender(name: str, count: int, routed: RoutedLM, router: AnyRouter) -> Contender:
    @contextmanager
    def spends() -> Iterator[None]:
        with routed.routed_by(router), routed.at(executed=[count]):
            yield

    return Contender(name, count, routed.backbone.model, spends)


def _entry(timings: Timings) -> dict[str, Any]:
    (prefill,), decode = timings.prefill.values(), timings.decode[1]
    return {
        "prefill_ms": statistics.median(prefill),
        "prefill_spread": [min(prefill), max(prefill)],
        "decode_ms": statistics.median(decode),
        "decode_spread": [min(decode), max(decode)],
    }
