"""Dr.LLM: imitate plans that were searched with the answers in hand (Heakl et al., 2510.12773)."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy import Context, Geometry, Probe, Router
from routers.gates import check_least, normalised
from routers.greedy import GreedyRemoval

ROUNDS = 4  # of a search, in which as many exchanges can add up
EPOCHS, BATCH, RATE, DECAY = 25, 16, 1e-3, 0.01  # of AdamW
GAMMA, BETA = 2.0, 0.999  # of focal loss (1708.02002) and of weights by class (1901.05555)


class DrLLM(Router):
    """Learned: from the prompt, the layers that a search with the text in hand would run.

    For each calibration window and each K of the recipe's budgets, a search finds the set of K layers whose loss on
    this window is least. A network is then trained, by focal loss with weights by class, to tell from the window's
    prompt which layers the found sets run. Its choice holds for the prompt and all that is generated after it.
    Calibration does all this; nothing is trained afterwards.

    Deviations from the paper:

    - A layer runs or is skipped; in the paper it may also run twice.
    - The count is exact: the K layers with the largest logits run, and k / R is an input of the network. In the paper
      the choices of the layers determine the count.
    - The search is local. It starts from the set that a greedy search finds on all windows, and goes on to the best of
      a round of sets that exchange one removed and one kept layer, if that is better. In the paper it is a Monte Carlo
      tree search from the full model with a bonus for short paths. Both measure about 50 sets.
    - Searches minimise the cross-entropy of the whole window, where the paper asks whether an answer is right.
    - One network reads the mean of the values that the context layer cached for the prompt. In the paper each layer has
      a network of this size, which reads the mean states that arrive there in 8 stretches of the prompt; they vote.
    - Sinks, the context layers and the last layer always run.

    Args:
        geometry: sizes of the backbone.
        simulations: sets measured for each window and K, from 4 on.
        windows: calibration windows to search for, from the first one; null for all.
        hidden: width of the network, as in the paper.

    Raises:
        ValueError: fewer simulations than rounds, no window, or no width.
    """

    kind = "learned"
    source = "arXiv 2510.12773"
    scope = "prompt"

    def __init__(
        self, geometry: Geometry, *, simulations: int = 48, windows: int | None = None, hidden: int = 128
    ) -> None:
        super().__init__(geometry)
        check_least(ROUNDS, simulations=simulations)
        check_least(1, windows=windows, hidden=hidden)
        self.simulations, self.windows = simulations, windows
        self.register_buffer("mean", torch.zeros(geometry.features))
        self.register_buffer("scale", torch.ones(geometry.features))
        self.input = nn.Linear(geometry.features + 1, hidden)
        self.output = nn.Linear(hidden, geometry.routable)
        self.requires_grad_(False)  # calibration trains them

    def calibrate(self, probe: Probe) -> None:
        """Search a set for each window and each K, and train the network on them."""
        if not probe.layer_counts:
            return
        windows, context = min(self.windows or probe.count, probe.count), probe.contexts()
        found = self.search(probe, windows)
        pooled = normalised(context.pooled[:windows])
        self.mean.copy_(pooled.mean(0))
        self.scale.copy_(pooled.std(0, correction=0).clamp(min=1e-6))
        inputs = torch.cat([self._inputs(pooled, torch.full((windows,), executed)) for executed in found])
        self._imitate(inputs, torch.cat([*found.values()]).to(inputs), probe.seed)

    def search(self, probe: Probe, windows: int) -> dict[int, Tensor]:
        """For each K the sets that were found for the first so many windows, (windows, R) bool."""
        greedy = GreedyRemoval(probe, windows)
        for _ in probe.track(range(greedy.rounds), "removing layers"):
            greedy.remove_one()
        kept = {k: torch.ones(windows, self.geometry.routable, dtype=torch.bool) for k in probe.layer_counts}
        for window in probe.track(range(windows), "searching plans for each window"):
            for executed, sets in kept.items():
                removed = greedy.removed[: self.geometry.layers - executed]
                sets[window, self._improved(probe, removed, window, executed)] = False
        return kept

    def score(self, context: Context) -> Tensor:
        """(..., R) float32 logits that a layer runs."""
        return self._logits(self._inputs(normalised(context.pooled), context.executed))

    def _improved(self, probe: Probe, removed: list[int], window: int, executed: int) -> list[int]:
        """The best set of removed layers that a local search for this window finds."""
        draw, seen = random.Random(f"{probe.seed} {window} {executed}"), {frozenset(removed)}
        least = self._losses(probe, [removed], window)[0]
        for _ in range(ROUNDS):
            kept = [layer for layer in range(self.geometry.routable) if layer not in removed]
            swaps = [frozenset({*removed, new} - {old}) for old in removed for new in kept]
            fresh = [swap for swap in swaps if swap not in seen]
            tried = draw.sample(fresh, min(len(fresh), self.simulations // ROUNDS))
            if not tried:
                break
            seen.update(tried)
            losses = self._losses(probe, tried, window)
            if min(losses) < least:
                least, removed = min(losses), sorted(tried[losses.index(min(losses))])
        return removed

    def _losses(self, probe: Probe, sets: list, window: int) -> list[float]:
        plans = torch.stack([probe.plan_without(removed) for removed in sets])
        return probe.losses(plans, "ce", [window], what="plans for each window")[:, 0].tolist()

    def _inputs(self, pooled: Tensor, executed: Tensor) -> Tensor:
        """(..., F + 1): the standardised state of the prompt, and k / R."""
        share = (executed - self.geometry.always_on) / self.geometry.routable
        return torch.cat([(pooled - self.mean) / self.scale, share.to(pooled)[..., None]], -1)

    def _logits(self, inputs: Tensor) -> Tensor:
        return self.output(F.gelu(self.input(inputs), approximate="tanh"))

    @torch.enable_grad()
    def _imitate(self, inputs: Tensor, runs: Tensor, seed: int) -> None:
        """Train on inputs (N, F + 1) and sets (N, R) of 0 and 1."""
        counts = torch.stack([(1 - runs).sum(), runs.sum()])
        weights = (1 - BETA) / (1 - BETA**counts)
        weight = (2 * weights / weights.sum())[runs.long()]
        optimizer = torch.optim.AdamW(self.requires_grad_(True).parameters(), lr=RATE, weight_decay=DECAY)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(inputs), generator=generator).split(BATCH):
                logits, wanted = self._logits(inputs[rows]), runs[rows]
                missed = (logits.sigmoid() - wanted).abs()  # 1 − the probability of the right class
                losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
                optimizer.zero_grad()
                (weight[rows] * missed**GAMMA * losses).mean().backward()
                optimizer.step()
        self.requires_grad_(False)
