"""Time of a prompt and of a decode step in two source trees: `python -m studies.engine_speed OTHER_TREE --rounds 9`.

Each tree runs in a process of its own, with the same embedded model and the same random `buddy` router. The processes
take turns, token by token and in random order, so that a change of the machine's speed meets both. Reported are medians
over rounds of the ratio this tree / other tree.
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
    asked = parser.parse_args()
    trees = {"this": Worker(Path.cwd()), "other": Worker(asked.other)}
    draw, found = random.Random(0), dict[str, list[tuple[float, float]]]()
    for number in range(asked.rounds + 1):
        for count in asked.executed:
            for kind, length in (("token", 64), ("shared", 64), ("token", 512), ("shared", 512)):
                spent = {name: trees[name].ask(kind, count, 1, 0, length) for name in draw.sample(list(trees), 2)}
                if number:
                    found.setdefault(f"prompt {length} {kind} K={count}", []).append((spent["this"], spent["other"]))
            for batch in (1, 8):
                for name in trees:
                    trees[name].ask("token", count, batch, 0, 64)
                total = dict.fromkeys(trees, 0.0)
                for at in range(64, 64 + asked.steps):
                    for name in draw.sample(list(trees), 2):
                        total[name] += trees[name].ask("step", count, batch, at, at + 1) / asked.steps
                if number:
                    found.setdefault(f"decode batch {batch} K={count}", []).append((total["this"], total["other"]))
    for key, pairs in found.items():
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        quarter = len(ratios) // 4
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(
            f"{key:24} {ours:8.2f} ms against {theirs:8.2f} ms, ratio {statistics.median(ratios):.3f} "
            f"[{ratios[quarter]:.3f}, {ratios[-1 - quarter]:.3f}]"
        )


if __name__ == "__main__":
    main()
