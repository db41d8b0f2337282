"""`Probe`: what a router may measure on the calibration windows before use.

One probe serves all routers of a recipe, so they see the same windows, and what one measured is not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buddy.calibration.measures import CRITERIA, Batch, Criterion, Losses, Pair, importance, similarities
from buddy.calibration.store import Memo, Store, setting_of
from buddy.engine.model import RoutedLM
from buddy.router import Context

Track = Callable[[Sequence[Any], str], Iterable[Any]]


def _silent(items: Sequence[Any], _: str) -> Iterable[Any]:
    return items


class Probe:
    """Measures a frozen model on calibration windows.

    Args:
        routed: the model; its router is not asked, only plans given here are run.
        windows: (N, W) long, calibration tokens.
        batch_size: windows per forward.
        track: wraps a loop to show progress, given what it runs over and a few words.
        asked: executed layers K that the budgets stand for.
        seed: for searches with randomness.
        prompt: tokens of a window that count as its prompt; half of them by default.
        store: the folder where measured values are kept, so that a search that was killed goes on where it was; None
            keeps them in memory only.

    Attributes:
        routed: the model.
        geometry: its sizes.
        asked: executed layers K below full depth that will be asked for, deepest first.
        seed: for searches with randomness.
        count: N, the number of windows.
        prompt: tokens of a window that count as its prompt.
    """

    def __init__(
        self,
        routed: RoutedLM,
        windows: Tensor,
        batch_size: int = 4,
        track: Track = _silent,
        *,
        asked: Iterable[int] = (),
        seed: int = 0,
        prompt: int | None = None,
        store: Path | None = None,
    ) -> None:
        self.routed, self.geometry = routed, routed.geometry
        self.serve(routed, asked)
        self.seed, self.count = seed, len(windows)
        self.prompt = windows.shape[1] // 2 if prompt is None else prompt
        self._batches, self._size = windows.split(batch_size), batch_size
        make = None if store is None else (lambda: Store(store, setting_of(self.routed, windows, batch_size)))
        self._memo = Memo(make)
        self._track, self._tracking = track, False

    def serve(self, routed: RoutedLM, asked: Iterable[int]) -> None:
        """Measure for another router of the same backbone and routing; what was measured stays.

        Args:
            routed: the model with that router attached.
            asked: executed layers K that its budgets stand for.

        Raises:
            ValueError: another backbone, context layer or number of sinks.
        """
        if _frame(routed) != _frame(self.routed):
            raise ValueError("a probe serves one backbone under one routing; make another probe for this one")
        self.routed = routed
        self.asked = tuple(sorted({k for k in asked if k < self.geometry.layers}, reverse=True))

    def release(self) -> None:
        """Free the memory that speeds up a search of many calls; what was measured stays."""
        if "_losses" in vars(self):
            self._losses.release()

    def track(self, items: Sequence[Any], words: str) -> Iterator[Any]:
        """The items one by one, with a progress bar, unless one is shown already or there are none."""
        if self._tracking or not items:
            yield from items
            return
        self._tracking = True
        try:
            yield from self._track(items, words)
        finally:
            self._tracking = False

    def losses(
        self,
        runs: Tensor,
        criterion: Criterion = "ce",
        windows: int | Sequence[int] | None = None,
        *,
        what: str | None = None,
    ) -> Tensor:
        """Mean nats a token of each window under each plan, (P, N') float64; nothing is measured twice.

        Plans that begin alike share the work up to the first layer where they differ, so many plans in one call cost
        less than one by one.

        Args:
            runs: (P, L) bool, a plan for all tokens in each row; sinks run every layer.
            criterion: "ce", next-token cross-entropy, or "kl", KL(dense ‖ plan), over positions 0 … W − 2.
            windows: N', only the first so many; or the numbers of some, in rising order; all by default.
            what: said beside the progress bar.

        Raises:
            ValueError: a plan leaves out a layer that always runs, or something else is out of range.
        """
        self._check(runs, criterion, windows)
        plans = ["".join("01"[on] for on in plan) for plan in runs.tolist()]
        batches = self._batched(self.count if windows is None else windows)
        wanted = {_key(criterion, b, plan): (b, plan) for b in batches for plan in sorted(set(plans), reverse=True)}
        missing = [wanted[key] for key in self._memo.missing(wanted)]
        if missing:
            count = len({plan for _, plan in missing})
            self._measure(missing, criterion, what or f"losses of {count} plan{'s' if count > 1 else ''}")
        wide = windows if isinstance(windows, int) else None  # the last of the first windows may lie within a batch
        rows = [torch.cat([self._memo[_key(criterion, b, plan)] for b in batches])[:wide] for plan in plans]
        count = self.count if windows is None else wide or len(windows)  # type: ignore[arg-type]  # 0 is refused
        return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.float64)

    def loss(self, runs: Tensor) -> float:
        """Mean next-token cross-entropy in nats under one plan for all tokens, runs (L,) bool."""
        return self.losses(runs[None]).mean().item()

    def plan_without(self, removed: Iterable[int]) -> Tensor:
        """(L,) bool, the plan that leaves out some routable layers, counted from 0 to R − 1."""
        runs = torch.ones(self.geometry.layers, dtype=torch.bool)
        runs[[self.geometry.context_layer + index for index in removed]] = False
        return runs

    @property
    def block_influence(self) -> Tensor:
        """(R,) float32: 1 − E[cos(h_in, h_out)] over tokens (ShortGPT, 2403.03853, eq. 1), sinks left out."""
        return self._similarity("block influence")

    @property
    def angular_distance(self) -> Tensor:
        """(R + 1, R + 1) float32: arccos(cos) / π between the states of windows' last tokens (2403.17887, eq. 6–7).

        [i, j], i < j, is the mean between what enters routable layers i and j; j = R stands for what leaves the last
        of them. Other entries are 0.
        """
        return self._similarity("angular distance")

    @property
    def loss_increase(self) -> Tensor:
        """(R,) float32: rise of the perplexity when one layer is skipped (Shortened LLaMA, 2402.02834, section 3.2)."""
        plans = [self.plan_without(removed) for removed in ([], *([i] for i in range(self.geometry.routable)))]
        perplexity = self.losses(torch.stack(plans), what="perplexity without a layer").mean(1).exp()
        return (perplexity[1:] - perplexity[0]).float()

    @property
    def taylor(self) -> Tensor:
        """(R,) float32: Σ |w · ∂L/∂w| over a layer's linear weights (Shortened LLaMA, 2402.02834, section 3.1)."""
        first, words = self.geometry.context_layer, "Taylor importance"
        if self._memo.missing([words]):
            layers, batches = range(first, first + self.geometry.routable), self.track(self._batches, words)
            self._memo[words] = importance(self.routed.backbone, batches, layers, self.count)
            self._memo.save()
        return self._memo[words].clone()

    @torch.no_grad()
    def contexts(self) -> Context:
        """What a router sees at the last token of each window's prompt, leading dimension (N,); K is full depth."""
        seen = []
        for batch in self.track(self._batches, "contexts of the prompts"):
            prompt = batch[:, : self.prompt].to(self.routed.backbone.device)
            context = self.routed(prompt, logits_to_keep=1).context
            seen.append([getattr(context, name)[:, -1] for name in ("pooled", "newest", "hidden", "executed")])
        return Context(*(torch.cat(parts) for parts in zip(*seen, strict=True)))

    def _similarity(self, name: str) -> Tensor:
        """Block Influence or the angular distances; one pass gives both."""
        names = ("block influence", "angular distance")
        if self._memo.missing(names):
            first, batches = self.geometry.context_layer, self.track(self._batches, " and ".join(names))
            both = similarities(self.routed.backbone, batches, first, self.routed.sink_tokens)
            for key, values in zip(names, both, strict=True):
                self._memo[key] = values
            self._memo.save()
        return self._memo[name].clone()  # whoever asks may change what is given

    def _batched(self, windows: int | Sequence[int]) -> Sequence[Batch]:
        """The batches to measure: the first ones, by number, or some windows, by their numbers."""
        if isinstance(windows, int):
            return range(-(-windows // self._size))
        return [tuple(windows[at : at + self._size]) for at in range(0, len(windows), self._size)]

    def _measure(self, missing: Sequence[Pair], criterion: Criterion, what: str) -> None:
        try:
            for b, plan, losses in self._losses.measure(missing, criterion, lambda pairs: self.track(pairs, what)):
                self._memo[_key(criterion, b, plan)] = losses
        finally:
            self._memo.save()

    @cached_property
    def _losses(self) -> Losses:
        return Losses(self.routed.backbone, self._batches, self.routed.sink_tokens)

    def _check(self, runs: Tensor, criterion: str, windows: int | Sequence[int] | None) -> None:
        layers, first = self.geometry.layers, self.geometry.context_layer
        if runs.dtype != torch.bool or runs.dim() != 2 or runs.shape[1] != layers:
            raise ValueError(f"runs is {runs.dtype} {tuple(runs.shape)}; give plans (P, {layers}) of bool")
        if not (runs[:, :first].all() and runs[:, -1].all()):
            raise ValueError(f"a plan leaves out a layer that always runs; keep the first {first} and the last")
        if criterion not in CRITERIA:
            raise ValueError(f"criterion is {criterion!r}; choose one of {', '.join(CRITERIA)}")
        if isinstance(windows, Sequence):
            if list(windows) != sorted({*windows} & {*range(self.count)}) or not windows:
                raise ValueError(f"windows is {list(windows)}; give rising numbers from 0 to {self.count - 1}")
        elif windows is not None and not 1 <= windows <= self.count:
            raise ValueError(f"windows is {windows}; there are {self.count} calibration windows")


def _key(criterion: str, batch: Batch, plan: str) -> str:
    """What a plan's losses on a batch are kept under."""
    return f"{criterion} {batch} {plan}"


def _frame(routed: RoutedLM) -> tuple[Any, ...]:
    """What must be the same for one probe."""
    return routed.backbone.model, routed.geometry, routed.sink_tokens
