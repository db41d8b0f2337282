"""`buddy bench --serve`: what a batch of texts gains, as `buddy serve` decodes it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from buddy.backbone.load import title_of
from buddy.console import print_titled_table, results, tracker
from buddy.engine.model import RoutedLM
from buddy.evaluation.bench import load_for_timing, sample_text
from buddy.io import within_memory, write_json
from buddy.metrics.timing import PROMPT, STEPS, Contender, contenders, machine, race, versions

BATCHES = (1, 2, 4, 8, 16, 32)
NAMES = {"dense": "dense", "routed": "a plan a row", "batch": "a plan a batch", "pruned": "pruned"}


def bench_serving(
    folder: Path, *, json_file: Path | None = None, budgets: Sequence[str] | None = None, rounds: int = 7
) -> None:
    """Time decode steps of 1 to 32 texts and print the table: dense, with a plan a row, a plan a batch, and pruned.

    Args:
        folder: the run.
        json_file: where the results go as JSON, if anywhere.
        budgets: instead of the recipe's.
        rounds: how often each contender runs.

    Raises:
        BuddyError: the run or a budget cannot be used, or memory does not suffice.
    """
    run, routed, _, below = load_for_timing(folder, json_file, budgets)
    ids = sample_text(run, routed, BATCHES[-1], PROMPT + STEPS)
    field = [each for each in contenders(routed, below, ids) if each.name in NAMES]
    model = routed.backbone.model
    field += [Contender("batch", k, model, lambda k=k: _one_plan(routed, k)) for k in below]  # type: ignore[misc]
    with within_memory(f"a batch of {BATCHES[-1]} texts", "free some, or bench a smaller backbone"):
        timings = race(field, ids, prompts=(PROMPT,), batches=BATCHES, rounds=rounds, track=tracker("Rounds"))
    entries: list[dict[str, Any]] = []
    for (name, layers), each in sorted(timings.items(), key=lambda item: (-item[0][1], list(NAMES).index(item[0][0]))):
        for texts, spent in each.decode.items():
            middle = statistics.median(spent)
            entry = {"contender": NAMES[name], "layers": layers, "texts": texts, "ms": middle}
            entries.append(entry | {"spread": [min(spent), max(spent)], "tokens_a_second": 1e3 * texts / middle})
    rows = []
    for first in range(0, len(entries), len(BATCHES)):
        part = entries[first : first + len(BATCHES)]
        cells = (f"{entry['tokens_a_second']:.1f} ({entry['ms']:.1f})" for entry in part)
        rows.append([part[0]["contender"], str(part[0]["layers"]), *cells])
    about = f"{run.router_name}, backbone {title_of(run.backbone)}"
    head = ["", "layers", *(f"{n} text{'s' * (n > 1)}" for n in BATCHES)]
    print_titled_table(f"{about}: tokens a second (ms between tokens)", head, rows)
    threads = torch.get_num_threads()
    results.print(f"Medians over {rounds} rounds of {STEPS} tokens after {PROMPT}, threads: {threads}; no HTTP.")
    if json_file:
        made = {"rounds": rounds, "threads": threads, "machine": machine(), "versions": versions()}
        write_json(json_file, {**made, "results": entries})
        results.print(f"JSON: {json_file}", soft_wrap=True)


@contextmanager
def _one_plan(routed: RoutedLM, executed: int) -> Iterator[None]:
    with routed.changed(batch_plan="shared"), routed.at(executed=[executed]):
        yield
