"""What does a second decision half-way up gain, from the hidden state that arrives there? On validation windows.

`python -m studies.second_decision RUN --texts sotu wikipedia.jsonl --train c4.jsonl --steps 150`

The run's router plans as before. At layer `--at` the plan of the remaining layers is made anew: the router's scores
plus those of a small network on the state that arrives there under the plan so far, with as many layers as the first
plan has left, so the count stays exact. The network is trained by perturbed plans of these layers, with AdamW and a
cosine. The control is the same network, trained alike, on the state after the context layer: what more training alone
gains.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.engine.model import RoutedLM
from buddy.io import keep_freed_memory
from buddy.losses import DenseDistribution, Objective, cross_entropy, draw_budgets, kl_to_dense
from buddy.plan import top_k
from buddy.router import LayerwiseRouter, available_budgets
from buddy.training.estimators import Perturbed, _direction
from studies.bridges import check_texts, opened, part_of

PLANS, SIGMA = 4, 0.15  # as in the recipe comparison


class Second(nn.Module):
    """Scores of the layers from `at` to the one before the last, added to the router's.

    Args:
        model: with a router that has scores.
        at: the first layer that is planned anew.
        seen: the layer at whose input the network reads the state; `at`, or the context layer for the control.
    """

    def __init__(self, model: RoutedLM, at: int, seen: int) -> None:
        super().__init__()
        size = model.geometry
        self.at, self.seen, self.first = at, seen, size.context_layer
        self.input = nn.Linear(size.hidden + 1, 128)
        self.output = nn.Linear(128, size.layers - 1 - at)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, state: Tensor, left: Tensor) -> Tensor:
        """(B, T, n) for states (B, T, D) and the layers that the first plan has left (B, T)."""
        share = (left / self.output.out_features)[..., None]
        hidden = F.layer_norm(state.float(), state.shape[-1:])
        return 2 * torch.tanh(self.output(F.silu(self.input(torch.cat([hidden, share], -1)))) / 2)

    def replan(self, runs: Tensor, scores: Tensor) -> Tensor:
        """The plan (B, T, L) with its layers from `at` on by these scores (B, T, n), as many as before."""
        found = runs.clone()
        found[..., self.at : -1] = top_k(scores, runs[..., self.at : -1].sum(-1))
        return found


@contextmanager
def captured(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states (B, T, D) that enter a layer within this block."""
    states: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: states.append(given[0].clone()))
    try:
        yield states
    finally:
        handle.remove()


@torch.no_grad()
def first_plan(
    model: RoutedLM, second: Second, ids: Tensor, executed: Tensor, prompt: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The router's plan (B, T, L), its scores (B, T, n) of the layers from `at` on, and the state that is seen."""
    with captured(model.backbone.layers[second.seen]) as states:
        output = model(ids, executed=executed, prompt=prompt, logits_to_keep=1)
    return output.runs, output.scores[..., second.at - second.first :], states[0]


def train(model: RoutedLM, second: Second, windows: Tensor, grid: list[int], prompt: int, steps: int) -> None:
    """By perturbed plans of the remaining layers, each token credited with its own KL to the dense model."""
    parts = [
        {"params": second.input.parameters(), "lr": 0.75e-3},
        {"params": [second.output.weight], "lr": 3e-3},
        {"params": [second.output.bias], "lr": 9e-3},
    ]
    optimizer = torch.optim.AdamW(parts, weight_decay=0.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    estimator = Perturbed(Objective(), PLANS, SIGMA)
    generator, scored = torch.Generator().manual_seed(0), torch.arange(prompt - 1, windows.shape[1] - 1)
    for step in range(steps):
        rows = torch.randperm(len(windows), generator=generator)[:4]
        ids, executed = windows[rows], draw_budgets(grid, 4, generator)
        runs, before, state = first_plan(model, second, ids, executed, prompt)
        scores = before + second(state, runs[..., second.at : -1].sum(-1))
        with torch.no_grad():
            dense = DenseDistribution(model.dense(ids, logits_to_keep=scored))
            noise = estimator._noise(scores, generator, torch.arange(len(ids)), len(ids))
            tried = [second.replan(runs, scores + SIGMA * each) for each in noise]
            logits = model(ids.repeat(PLANS, 1), runs=torch.cat(tried), logits_to_keep=scored).logits
            losses = torch.stack([kl_to_dense(dense, each) for each in logits.chunk(PLANS)])  # (M, B, S)
            direction = _direction(losses, torch.stack(tried)[:, :, scored, second.at : -1], SIGMA)
        loss = (direction * scores[:, scored]).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(second.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        if step % 25 == 24:
            print(f"step {step + 1} of {steps}, KL {losses.mean():.3f}", flush=True)


@torch.no_grad()
def perplexities(model: RoutedLM, networks: dict[str, Second], ids: Tensor, count: int, prompt: int) -> dict[str, str]:
    """Under the router's plan and with each network's second decision, which changes so many tokens' plans."""
    scored = torch.arange(prompt - 1, ids.shape[1] - 1)
    sums: dict[str, list[Tensor]] = {name: [] for name in ("router", *networks)}
    changed: dict[str, list[Tensor]] = {name: [] for name in networks}
    for batch in ids.split(4):
        executed = torch.full((len(batch),), count)
        plans = {}
        for name, second in networks.items():
            runs, before, state = first_plan(model, second, batch, executed, prompt)
            plans["router"] = runs
            plans[name] = second.replan(runs, before + second(state, runs[..., second.at : -1].sum(-1)))
            changed[name].append((plans[name] != runs).any(-1))
        for name, runs in plans.items():
            logits = model(batch, runs=runs, logits_to_keep=scored).logits
            sums[name].append(cross_entropy(logits, batch[:, scored + 1]))
    found = {name: f"{torch.cat(parts).mean().exp():.2f}" for name, parts in sums.items()}
    return found | {f"{name} changes": f"{torch.cat(each).double().mean():.0%}" for name, each in changed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--train", nargs="+", default=["sotu"], help="texts for training, none of them measured")
    parser.add_argument("--texts", nargs="+", default=["sotu"])
    parser.add_argument("--at", type=int, default=15, help="layers before the second decision")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--validation", type=int, default=12, help="windows of each text")
    asked = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    recipe, model = opened(asked.run)
    check_texts(parser, recipe, asked.train, asked.texts)
    if model.router.full_depth or isinstance(model.router, LayerwiseRouter):
        parser.error("the run's router has no scores; name a run of another router")
    prompt, context_layer = recipe.data.prompt, model.geometry.context_layer
    share = -(-4 * asked.steps // len(asked.train))
    windows = torch.cat([part_of(recipe, model.backbone, text, "calibration", share).input_ids for text in asked.train])
    if len(windows) < 4 * asked.steps:
        print(f"{len(windows)} windows to train on, some of them more than once", flush=True)
    counts = [model.executed_layers(budget) for budget in available_budgets(model.router, recipe.budgets)]
    grid = [count for count in counts if count < model.geometry.layers]
    networks = {}
    for name, seen in {"second": asked.at, "control": context_layer}.items():
        networks[name] = Second(model, asked.at, seen)
        print(f"{name}: the state at the input of layer {seen}")
        train(model, networks[name], windows, grid, prompt, asked.steps)
    for text in asked.texts:
        ids = part_of(recipe, model.backbone, text, "validation", asked.validation).input_ids
        for count in grid:
            found = perplexities(model, networks, ids, count, prompt)
            print(f"{Path(text).stem:20} {count}  " + "  ".join(f"{name} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
