"""Time of a prompt and of a decode step in two source trees: `python -m studies.engine_speed OTHER_TREE --rounds 9`.

Each tree runs in two processes, with the same embedded model and the same random `buddy` router. The processes
take turns, token by token and in random order, so that a change of the machine's speed meets both. Reported are ratios
of medians and of first quartiles, which other work on the machine disturbs less, over all steps of all rounds.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

WORKER = """
import contextlib, json, sys, time
import torch
torch.set_num_threads(1)
try:
    from buddy.backbone.load import load_backbone
except ImportError:
    from buddy.backbone import load_backbone
from buddy.engine.model import RoutedLM, geometry_of
from routers.buddy import BuddyRouter
backbone = load_backbone("smollm2-135m")
torch.manual_seed(0)
router = BuddyRouter(geometry_of(backbone))
torch.nn.init.normal_(router.output.weight)
routed = RoutedLM(backbone, router)
ids = torch.randint(1000, 40000, (8, 600), generator=torch.Generator().manual_seed(1))
cache = None
print("ready", flush=True)
for line in sys.stdin:
    kind, count, batch, first, end = json.loads(line)
    settings = routed.changed(prompt_plan="shared") if kind == "shared" else contextlib.nullcontext()
    with torch.inference_mode(), settings, routed.at(executed=[count]):
        start = time.perf_counter()
        out = backbone.model(ids[:batch, first:end], cache=cache if kind == "step" else None, use_cache=True,
                             logits_to_keep=1)
        spent = 1e3 * (time.perf_counter() - start)
    cache = out.cache
    print(json.dumps(spent), flush=True)
"""


class Worker:
    """A process that runs the engine of one tree."""

    def __init__(self, tree: Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], cwd=tree, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def ask(self, *call: object) -> float:
        """Milliseconds of one forward."""
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="root of another checkout")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--executed", type=int, nargs="+", default=[15, 22, 30])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, nargs="*", default=[64, 512])
    asked = parser.parse_args()
    trees = {"this": Path.cwd(), "other": asked.other}
    # Two processes a tree: where a process happens to hold the weights in memory alone is worth some per cent.
    workers = [(name, Worker(tree)) for name, tree in trees.items() for _ in range(2)]
    draw, found = random.Random(0), dict[str, dict[str, list[float]]]()
    for number in range(asked.rounds + 1):
        for count in asked.executed:
            for kind, length in [(kind, length) for length in asked.prompts for kind in ("token", "shared")]:
                for name, worker in draw.sample(workers, len(workers)):
                    spent = worker.ask(kind, count, 1, 0, length)
                    if number:
                        found.setdefault(f"prompt {length} {kind} K={count}", {}).setdefault(name, []).append(spent)
            for batch in asked.batches:
                for _, worker in workers:
                    worker.ask("token", count, batch, 0, 64)
                for at in range(64, 64 + asked.steps):
                    for name, worker in draw.sample(workers, len(workers)):
                        spent = worker.ask("step", count, batch, at, at + 1)
                        if number:
                            found.setdefault(f"decode batch {batch} K={count}", {}).setdefault(name, []).append(spent)
    for key, by in found.items():
        low, mid = ({name: statistics.quantiles(by[name], n=4)[i] for name in by} for i in (0, 1))
        print(
            f"{key:26} {mid['this']:8.2f} ms against {mid['other']:8.2f} ms: ratio of medians "
            f"{mid['this'] / mid['other']:.3f}, of first quartiles {low['this'] / low['other']:.3f}"
        )


if __name__ == "__main__":
    main()
