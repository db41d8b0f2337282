"""`buddy bench --serve`: tokens per second of many clients, by the decoder of `buddy serve`."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from buddy.backbone.load import MIN_LAYERS, title_of
from buddy.console import counted, print_titled_table, report_json, stdout, tracker
from buddy.engine.decode import Decoder, Row
from buddy.engine.model import RoutedLM, geometry_of
from buddy.engine.shared_weights import pruned_model
from buddy.evaluation.bench import load_for_timing, sample_text
from buddy.io import within_memory
from buddy.metrics.timing import PROMPT, STEPS, commonest_layers, milliseconds
from buddy.provenance import machine, versions
from buddy.registry import build

BATCHES = (1, 2, 4, 8, 16, 32)
SHORTEST = PROMPT // 2  # prompts have from so many to `PROMPT` tokens, as those of clients differ


@dataclass(frozen=True)
class Served:
    """A way to decode.

    Attributes:
        name: as the table has it.
        layers: K.
        routed: its model.
        batch_plan: see `RoutedLM`.
    """

    name: str
    layers: int
    routed: RoutedLM
    batch_plan: str

    def begin(self, texts: Sequence[list[int]]) -> Decoder:
        """A decoder that has read the prompts of these texts and writes their other tokens."""
        decoder = Decoder(self.routed, chunk=sum(map(len, texts)))
        for number, text in enumerate(texts):
            prompt = PROMPT - number % 4 * (PROMPT - SHORTEST) // 3
            # A token is chosen, and the text's own is written, so that all decode the same.
            given = partial(lambda text, tokens, logits: torch.full_like(logits.argmax(), text[len(tokens)]), text)
            decoder.add(Row(text[:prompt], self.layers, given, STEPS + 1))
        self.step(decoder)
        return decoder

    def step(self, decoder: Decoder) -> float:
        """Milliseconds of one step."""
        with self.routed.changed(batch_plan=self.batch_plan):
            return milliseconds(decoder.step, self.routed.backbone.device)


def bench_serving(
    folder: Path, *, json_file: Path | None = None, budgets: Sequence[str] | None = None, rounds: int = 7
) -> None:
    """Time decode steps of 1 to 32 texts and print a table: full depth, a plan per row, a plan per batch, and pruned.

    Args:
        folder: the run.
        json_file: where the results go as JSON, if anywhere.
        budgets: instead of the recipe's.
        rounds: how often each way runs.

    Raises:
        BuddyError: the run or a budget cannot be used, or memory does not suffice.
    """
    run, routed, _, below = load_for_timing(folder, json_file, budgets)
    ids = sample_text(run, routed, BATCHES[-1], PROMPT + STEPS + 2)
    ways = [Served("full depth", routed.geometry.layers, routed, "row")]
    for count in below:
        ways += [Served("a plan per row", count, routed, "row"), Served("a plan per batch", count, routed, "shared")]
        if count >= MIN_LAYERS:  # of a model that can be decoded
            ways.append(Served("pruned", count, _pruned(routed, commonest_layers(routed, ids[:1], count)), "row"))
    with within_memory(f"a batch of {BATCHES[-1]} texts", "free some, or bench a smaller backbone"):
        spent = _time_interleaved(ways, ids.tolist(), rounds)
    entries: list[dict[str, Any]] = []
    for way, times in zip(ways, spent, strict=True):
        for texts, each in times.items():
            middle = statistics.median(each)
            entry = {"case": way.name, "layers": way.layers, "texts": texts, "ms": middle}
            entries.append(entry | {"spread": [min(each), max(each)], "tokens_a_second": 1e3 * texts / middle})
    threads, over = torch.get_num_threads(), routed.settings.competing
    made = {"rounds": rounds, "threads": threads, "machine": machine(), "versions": versions()}
    report_json(json_file, {**made, "results": entries})
    rows = []
    for first in range(0, len(entries), len(BATCHES)):
        part = entries[first : first + len(BATCHES)]
        cells = (f"{entry['tokens_a_second']:.1f} ({entry['ms']:.1f})" for entry in part)
        rows.append([part[0]["case"], str(part[0]["layers"]), *cells])
    about = f"{run.router_name}, backbone {title_of(run.backbone)}"
    head = ["", "layers", *(counted(n, "text") for n in BATCHES)]
    print_titled_table(f"{about}: tokens per second (ms between tokens)", head, rows)
    spans = f"{SHORTEST} to {PROMPT}"
    mean = " A plan per row runs K layers in the mean over tokens, a plan per batch in each." if over > 1 else ""
    stdout.print(
        f"Medians over {rounds} rounds of {STEPS} tokens after {spans}, threads: {threads}; no HTTP.{mean}",
        soft_wrap=False,
    )


def _time_interleaved(ways: Sequence[Served], texts: Sequence[list[int]], rounds: int) -> list[dict[int, list[float]]]:
    """For each way and number of texts, the mean milliseconds of a step in each round, after one that is not counted.

    All take one step before any takes the next, in an order that is drawn, so that a short disturbance of the machine
    affects all of them.
    """
    spent: list[dict[int, list[float]]] = [{count: [] for count in BATCHES} for _ in ways]
    draw = random.Random(0)
    for number in tracker("Rounds, the first to warm up")(range(rounds + 1)):
        for count in BATCHES:
            decoders = [way.begin(texts[:count]) for way in ways]
            total = [0.0] * len(ways)
            for _ in range(STEPS):
                for place in draw.sample(range(len(ways)), len(ways)):
                    total[place] += ways[place].step(decoders[place])
            for times, each in zip(spent, total, strict=True):
                times[count].extend([each / STEPS] if number else [])
    return spent


def _pruned(routed: RoutedLM, kept: Sequence[int]) -> RoutedLM:
    """The backbone cut to some of its layers, all of which run, for the same decoder."""
    backbone = replace(routed.backbone, model=pruned_model(routed.backbone.model, kept))
    return RoutedLM(backbone, build("full", geometry_of(backbone), {}))
