"""What is a layer worth, and does it differ from token to token? On validation windows of some texts.

`python -m studies.importance RUN --texts sotu wikipedia.jsonl`

Each routable layer is skipped alone, by all tokens but the sinks, with the run's bridges and without; KL to the dense
model in nats a token. Then, with bridges: how often the layer that costs a token least is the one that costs all tokens
least, and what a choice of each token's own layer would gain in hindsight. At the end, how many distinct plans the
router makes at each budget, and the share of tokens that have the commonest.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from buddy.build import load_model
from buddy.engine.model import RoutedLM
from buddy.io import keep_freed_memory
from buddy.losses import Dense, kl_to_dense
from buddy.router import available_budgets
from buddy.run import read_run
from studies.bridges import part_of


@torch.no_grad()
def costs(model: RoutedLM, ids: Tensor, prompt: int, batch_size: int = 4) -> Tensor:
    """(R, tokens) float64: KL to the dense model without each routable layer, of the tokens that are scored."""
    first, layers = model.geometry.context_layer, model.geometry.layers
    scored, parts = torch.arange(prompt - 1, ids.shape[1] - 1), []
    for batch in ids.split(batch_size):
        dense = Dense(model.dense(batch, logits_to_keep=scored))
        rows = []
        for layer in range(first, layers - 1):
            runs = torch.ones(*batch.shape, layers, dtype=torch.bool)
            runs[:, model.sink_tokens :, layer] = False
            logits = model(batch, runs=runs, logits_to_keep=scored).logits
            rows.append(kl_to_dense(dense, logits).double().flatten())
        parts.append(torch.stack(rows))
    return torch.cat(parts, 1)


@torch.no_grad()
def plans(model: RoutedLM, ids: Tensor, executed: int) -> tuple[int, float]:
    """How many distinct plans the tokens of windows (N, T) have, sinks left out, and the share of the commonest."""
    made = [model(batch, executed=torch.full((len(batch),), executed), logits_to_keep=1).runs for batch in ids.split(4)]
    flat = torch.cat(made)[:, model.sink_tokens :].flatten(0, 1)
    counts = flat.unique(dim=0, return_counts=True)[1]
    return len(counts), float(counts.max() / counts.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", nargs="+", default=["sotu"])
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    asked = parser.parse_args()
    keep_freed_memory()
    run = read_run(asked.run)
    recipe, model = run.recipe, load_model(run)
    bridges, first = model.bridges, model.geometry.context_layer
    parts = [part_of(recipe, model, text, "validation", asked.windows).input_ids for text in asked.texts]
    ids = torch.cat(parts)
    for name, each in {"without bridges": None, "with bridges": bridges}.items():
        if name == "with bridges" and bridges is None:
            continue
        model.bridge(each)
        cost = costs(model, ids, recipe.data.prompt)
        mean = cost.mean(1)
        print(f"{name}: " + " ".join(f"{layer + first}:{value:.3f}" for layer, value in enumerate(mean.tolist())))
        top = mean.sort(descending=True).values
        print(
            f"  three largest {top[:3].sum() / top.sum():.0%} of the sum, largest {top[0] / top.median():.0f} x median"
        )
        least, own = mean.min(), cost.min(0).values.mean()
        same = (cost.argmin(0) == mean.argmin()).double().mean()
        order = cost.argsort(0).argsort(0).double()
        common = mean.argsort().argsort().double()
        ranks = torch.corrcoef(torch.cat([common[None], order.T]))[0, 1:].mean()
        print(
            f"  least {least:.4f}, each token's own {own:.4f} ({own / least - 1:+.0%}), the same layer for {same:.0%}"
        )
        print(f"  rank correlation of a token's costs with the mean costs {ranks:.2f}", flush=True)
    for budget in available_budgets(model.router, recipe.budgets):
        count = model.executed_layers(budget)
        if count < model.geometry.layers:
            number, share = plans(model, ids, count)
            print(f"{count} layers: {number} plans for {ids.numel()} tokens, the commonest for {share:.0%}", flush=True)


if __name__ == "__main__":
    main()
