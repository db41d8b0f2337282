"""`buddy bench` and the times of a comparison: how fast runs are at each budget."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buddy.backbone.load import Backbone, title_of
from buddy.builders.data import build_windows
from buddy.builders.model import build_model, counts_of, load_model, restore
from buddy.console import NONE, print_titled_table, report_json, status, stderr, stdout, tracker
from buddy.engine.bridges import Bridges
from buddy.engine.forward import Settings
from buddy.engine.model import RoutedLM
from buddy.engine.record import Record
from buddy.engine.shared_weights import pruned_model
from buddy.errors import BuddyError, BudgetError, RunError
from buddy.evaluation.figures import figure_at
from buddy.io import check_output_path, checksum, read_json, within_memory, write_with_checksum
from buddy.metrics.timing import PROMPT, STEPS, BenchmarkCase, Timings, benchmark_cases, time_interleaved
from buddy.provenance import machine, versions
from buddy.router import AnyRouter, available_budgets
from buddy.run import Run, read_run
from buddy.run_files import BRIDGE, ROUTER

FIGURE = "speed.png"
FILE, ROUNDS = "speed.json", 3  # of a comparison
LONG, BATCH = 512, 8
LATE = 1024  # tokens of context before the late decode steps, where the backbone reads as many


def bench_run(
    folder: Path, *, json_file: Path | None = None, budgets: Sequence[str] | None = None, rounds: int = 7
) -> None:
    """Time a run and print the table.

    Args:
        folder: the run.
        json_file: where the results go as JSON, if anywhere.
        budgets: instead of the recipe's.
        rounds: how often each case runs.

    Raises:
        BuddyError: the run or a budget cannot be used, or memory does not suffice.
    """
    run, routed, counts, below = load_for_timing(folder, json_file, budgets)
    ids = sample_text(run, routed, BATCH, LONG)
    late = ids.flatten()[None, : min(LATE + STEPS, routed.backbone.context_length)]
    decoded = ids[:, : PROMPT + STEPS]
    sizes = f"{routed.geometry.layers} layers of width {routed.geometry.hidden} and a batch of {BATCH} × {LONG} tokens"
    with within_memory(sizes, "free some, or bench a smaller backbone"):
        timings = time_interleaved(
            benchmark_cases(routed, below, ids),
            {"prefill": ids[:1], "prefill64": ids[:1, :PROMPT]},
            {"decode": decoded[:1], "decode_late": late, "decode_batch8": decoded},
            rounds=rounds,
            track=tracker("Rounds, the first to warm up"),
        )
    report = as_json(counts, timings, routed.geometry.layers)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    if routed.backbone.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    report |= {"peak_memory_mib": peak, "threads": torch.get_num_threads(), "rounds": rounds}
    if routed.mean_over > 1:
        report["executed"] = {count: timings["routed", count].executed for count in below}
    # Budgets such as 15ms use this table from now on.
    latency = routed.table.remeasure(routed, rounds)  # type: ignore[attr-defined]
    report |= {"late_context": late.shape[1] - STEPS, "latency_ms": latency}
    report_json(json_file, report)
    drawn: Path | None = run.folder / FIGURE
    try:
        draw(report, run.folder / FIGURE)
    except RunError as error:  # timing works in a read-only run folder
        stderr.print(f"No figure: {error}")
        drawn = None
    _show(report, run)
    if drawn:
        stdout.print(f"Figure: {drawn}")


def load_for_timing(
    folder: Path, json_file: Path | None, budgets: Sequence[str] | None
) -> tuple[Run, RoutedLM, dict[str, int], list[int]]:
    """A run and its model; K for each budget, the recipe's by default; and each K below full depth, falling.

    Raises:
        BuddyError: the run or the JSON file cannot be used, a budget is out of range, or none is below full depth.
    """
    run = read_run(folder)
    if json_file:
        check_output_path(json_file, *run.inputs)
    with status(f"Loading {run.backbone} …"):
        routed = load_model(run, merged=True)
    wanted: Sequence[float | str] = budgets or available_budgets(routed.router, run.recipe.budgets)
    counts = {str(budget): routed.executed_layers(budget) for budget in wanted}
    below = sorted({count for count in counts.values() if count < routed.geometry.layers}, reverse=True)
    if routed.router.full_depth:
        raise BudgetError("This run's router runs every layer, so there is nothing to time; name another run.")
    if not below:
        raise BudgetError("All budgets are full depth; give one below 1.0, such as --budgets 0.5.")
    return run, routed, counts, below


def as_json(counts: Mapping[str, int], timings: Mapping[tuple[str, int], Timings], layers: int) -> dict[str, Any]:
    """{"results": [one entry a budget], "dense": …}; milliseconds are medians over rounds, and so are the ratios.

    Ratios are taken within a round, between runs a few seconds apart, so that a drift of the machine's speed cancels.
    """
    dense = timings["dense", layers]
    entries = []
    for budget, count in counts.items():
        ours = timings["full" if count == layers else "routed", count]
        entry = {"budget": budget, "layers": count} | _entry(ours) | _ratios(ours, dense, "dense")
        if count < layers:
            pruned, shared = timings["pruned", count], timings["shared", count].rounds["prefill"]
            entry |= _ratios(ours, pruned, "pruned") | {f"pruned_{key}": v for key, v in _entry(pruned).items()}
            entry |= _ratios(pruned, dense, "dense", "pruned_")
            entry["prefill_shared_ms"] = statistics.median(shared)
            entry["vs_pruned_prefill_shared"] = _ratio(shared, pruned.rounds["prefill"])
            entry["vs_dense_prefill_shared"] = _ratio(shared, dense.rounds["prefill"])
            entry["cache_bytes_shared"] = timings["shared", count].cache_bytes
        entries.append(entry)
    return {"results": entries, "dense": _entry(dense)}


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Milliseconds over executed layers: routed, pruned and dense, for prefill and decode."""
    with figure_at(path, ncols=2, figsize=(10, 4)) as axes:
        entries = sorted(report["results"], key=lambda entry: entry["layers"])
        cut = [entry for entry in entries if "pruned_decode_ms" in entry]
        titles = {"decode_ms": "decode, batch 1 (ms per token)", "prefill_ms": f"prefill, {LONG} tokens (ms)"}
        for ax, (key, title) in zip(axes, titles.items(), strict=True):
            ax.plot([e["layers"] for e in entries], [e[key] for e in entries], "o-", label="routed")
            ax.plot([e["layers"] for e in cut], [e[f"pruned_{key}"] for e in cut], "s--", label="pruned stock")
            ax.axhline(report["dense"][key], color="grey", linestyle=":", label="dense stock")
            ax.set(title=title, xlabel="executed layers", ylim=(0, None))
            ax.grid(alpha=0.3)
            ax.legend()


def _entry(timings: Timings) -> dict[str, Any]:
    """Figures of one case."""
    return _summary(timings.rounds) | {"cache_bytes": timings.cache_bytes, "prefill_flops": timings.flops}


def _summary(series: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Median, least and most milliseconds of each series."""
    entry: dict[str, Any] = {f"{key}_ms": statistics.median(values) for key, values in series.items()}
    return entry | {f"{key}_spread": [min(values), max(values)] for key, values in series.items()}


def _ratios(ours: Timings, theirs: Timings, name: str, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}vs_{name}_{key}": _ratio(values, theirs.rounds[key]) for key, values in ours.rounds.items()}


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _show(report: Mapping[str, Any], run: Run) -> None:
    head = (
        *("budget", "layers", "decode", f"decode after {report['late_context']}", f"decode, batch {BATCH}"),
        *(f"prefill {LONG}", "one plan", f"prefill {PROMPT}", "GFLOP", "cache MiB"),
    )
    rows = []
    for entry in ({"budget": "dense", "layers": NONE} | report["dense"], *report["results"]):
        keys = ("decode", "decode_late", "decode_batch8", "prefill", "prefill_shared", "prefill64")
        flops, cache = entry["prefill_flops"]["total"] / 1e9, entry["cache_bytes"] / 2**20
        cells = (_cell(entry, key) for key in keys)
        rows.append([str(entry["budget"]), str(entry["layers"]), *cells, f"{flops:.1f}", f"{cache:.2f}"])
    about = f"{run.router_name}, backbone {title_of(run.backbone)}"
    print_titled_table(f"{about}: milliseconds (× dense, × pruned to as many layers)", head, rows)
    stdout.print(
        f"Decode: mean over {STEPS} tokens after {PROMPT}, rerouted as in the run. One plan: prefill of {LONG} with "
        f"one plan for the prompt. GFLOP and cache: prefill of {LONG}, head included. Medians over "
        f"{report['rounds']} rounds, threads: {report['threads']}.",
        soft_wrap=False,
    )
    if "executed" in report:
        means = {k: " / ".join(f"{mean:.1f}" for mean in each.values()) for k, each in report["executed"].items()}
        ran = ", ".join(f"{each} at {k}" for k, each in means.items())
        stdout.print(
            f"Budgets hold in the mean over tokens. On average the timed ones ran so many layers (decode / after "
            f"{report['late_context']} / batch {BATCH}): {ran}."
        )
    taken = ", ".join(f"{spent:.3g} at {count}" for count, spent in report["latency_ms"].items())
    stdout.print(f"Milliseconds a token after {PROMPT} by layers, stored for budgets such as 15ms: {taken}.")
    stdout.print(f"Peak memory of the process: {report['peak_memory_mib']:.0f} MiB.")


def _cell(entry: Mapping[str, Any], key: str) -> str:
    if f"{key}_ms" not in entry:
        return NONE
    ratios = [f"{entry[name]:.3f}" for name in (f"vs_dense_{key}", f"vs_pruned_{key}") if name in entry]
    return f"{entry[f'{key}_ms']:.2f}" + (f" ({', '.join(ratios)})" if ratios else "")


def sample_text(run: Run, routed: RoutedLM, rows: int, length: int) -> torch.Tensor:
    """(rows, length) tokens of the run's text; repeated where it is short."""
    windows = build_windows(
        run.recipe, routed.backbone.tokenizer, run.recipe.data.source, count=rows, window=length
    ).input_ids
    repeats = -(-rows // len(windows))
    return windows.repeat(repeats, 1)[:rows].to(routed.backbone.device)


def measured(runs: Mapping[str, Run], backbone: Backbone, windows: Tensor, folder: Path) -> dict[str, Any]:
    """Milliseconds of each router below full depth, of the engine at full depth and of the stock model.

    All take turns, in decoding token by token, so that a drift of the machine's speed affects all of them. Times of
    the same routers are read from the folder. Healed runs are timed without their adapters, which are merged into the
    weights for serving.

    Args:
        runs: a finished run of each router, by label.
        backbone: not routed.
        windows: (N, W) long; the prefill of W tokens is timed, and the decoding of `STEPS` tokens after `PROMPT`.
        folder: where the times are stored, in speed.json.

    Returns:
        "dense" (the stock model), "full" (the engine at full depth) and, as "results", an entry for each router and K.
        Each has "prefill_ms", milliseconds of the whole prefill, and "decode_ms", milliseconds a decoded token: medians
        over rounds; "prefill_spread" and "decode_spread", the least and the most of a round; "decode_layers", the
        layers that a decoded token ran on average; and "multiply_adds", millions for each token of the prefill,
        without the head. Beside them "tokens" (W), "prompt" and "steps"
        (tokens), "rounds" and "threads".

    Raises:
        RunError: memory does not suffice, or the folder cannot be written.
    """
    tokens = windows.shape[1]
    made: dict[str, Any] = {"runs": {label: _identity(run) for label, run in runs.items()}}
    made |= {"backbone": backbone.fingerprint, "device": str(backbone.device), "threads": torch.get_num_threads()}
    made |= {"machine": machine(), "versions": versions()}
    with suppress(BuddyError, KeyError):  # not measured yet, or cut
        kept = read_json(folder / FILE)
        if kept["made"] == made and kept["tokens"] == tokens and "decode_layers" in kept["full"]:
            return kept
    needed = max(tokens, PROMPT + STEPS)
    ids = windows.flatten().repeat(-(-needed // windows.numel()))[None, :needed].to(backbone.device)
    with within_memory(f"a prompt of {tokens} tokens", "give --no-speed"), _field(runs, backbone) as field:
        timings = time_interleaved(
            field,
            {"prefill": ids[:, :tokens]},
            {"decode": ids[:, : PROMPT + STEPS]},
            rounds=ROUNDS,
            track=tracker("Timing, the first round to warm up"),
        )
    dense, full, *others = ((*case, _times_entry(each, tokens)) for case, each in timings.items())
    found = {"made": made, "tokens": tokens, "prompt": PROMPT, "steps": STEPS, "rounds": ROUNDS}
    found |= {"threads": torch.get_num_threads(), "dense": dense[2], "full": full[2]}
    found["results"] = [{"router": name, "layers": layers} | entry for name, layers, entry in others]
    write_with_checksum(folder / FILE, found)
    return found


def _identity(run: Run) -> dict[str, str]:
    """What the times of a run depend on."""
    recipe, files = run.recipe, [name for name in (ROUTER, BRIDGE) if (run.folder / name).exists()]
    settings = str((recipe.router, recipe.routing, recipe.budgets, recipe.backbone.dtype))
    return {name: checksum(run.folder / name) for name in files} | {"settings": settings}


@contextmanager
def _field(runs: Mapping[str, Run], backbone: Backbone) -> Iterator[list[BenchmarkCase]]:
    """The stock model; the engine at full depth, which is the same for all; each router at each K below.

    One routed model takes the routers in turn, so that a turn can be as short as a token.
    """
    routers = {label: _loaded_router(run, backbone) for label, run in runs.items()}
    layers, routed = backbone.num_layers, build_model(next(iter(runs.values())).recipe, backbone)
    try:
        field = [
            BenchmarkCase("dense", layers, pruned_model(backbone.model, range(layers)), nullcontext),
            _case("full", layers, routed, routed.router, None, routed.settings),
        ]
        for label, (parts, counts) in routers.items():
            field += [_case(label, count, routed, *parts) for count in counts if count < layers]
        yield field
    finally:
        routed.detach()


def _loaded_router(run: Run, backbone: Backbone) -> tuple[tuple[AnyRouter, Bridges | None, Settings], Sequence[int]]:
    """Router, bridges and settings of a run, and K for each of its budgets, without repeats."""
    routed = build_model(run.recipe, backbone)
    try:
        restore(routed, run.recipe, run.folder, adapter=False)
        counts = dict.fromkeys(counts_of(run.recipe, routed).values())
        return (routed.router, routed.bridges, routed.settings), list(counts)
    finally:
        routed.detach()


def _case(
    name: str, count: int, routed: RoutedLM, router: AnyRouter, bridges: Bridges | None, settings: Settings
) -> BenchmarkCase:
    @contextmanager
    def context() -> Iterator[Record]:
        routed.bridges = bridges
        with routed.changed(router, **vars(settings)), routed.at(executed=[count]) as record:
            yield record

    return BenchmarkCase(name, count, routed.backbone.model, context)


def _times_entry(timings: Timings, tokens: int) -> dict[str, Any]:
    work = {"decode_layers": timings.executed["decode"], "multiply_adds": timings.flops["without_head"] / 2e6 / tokens}
    return _summary(timings.rounds) | work
