"""`python -m tests.soak`: kills, and malformed recipes and files, as many as are asked for; 1 where one failed."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path


def main() -> int:
    """Run what was asked for; how many failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="of each job; 0 for none")
    parser.add_argument("--examples", type=int, default=1000, metavar="N", help="malformed recipes; 0 for none")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments and of the inputs")
    parser.add_argument("--jobs", default="", metavar="A,B…", help="of fit, calibration, compare, export, conversion")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"BUDDY_CALIBRATION_CACHE": "", "BUDDY_LATENCY_CACHE": ""}
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        os.environ["HF_DATASETS_CACHE"] = f"{work}/cache"
        failed = _kill(asked.kills, asked.seed, asked.jobs, Path(work)) if asked.kills else 0
        return failed + (_draw(asked.examples, asked.seed, Path(work) / "malformed") if asked.examples else 0)


def _kill(kills: int, seed: int, names: str, work: Path) -> int:
    import torch

    torch.set_num_threads(1)
    from tests.soak.kills import Died, jobs, soak

    failed = 0
    for job in jobs(work):
        if names and job.name not in names.split(","):
            continue
        start = time.monotonic()
        try:
            tally = soak(job, work / job.name, kills, seed)
        except (AssertionError, Died) as error:
            print(f"{job.name}: failed: {error}", flush=True)
            failed += 1
            continue
        moments = ", ".join(f"{moment}: {count}" for moment, count in tally.moments.most_common())
        seconds = time.monotonic() - start
        print(f"{job.name}: {tally.kills} kills in {tally.rounds} rounds, {seconds:.0f} s. {moments}", flush=True)
    return failed


def _draw(examples: int, seed: int, work: Path) -> int:
    from buddy.compare import fit
    from tests.recovery.malformed import Bench, fuzz
    from tests.small import Small, write_text
    from tests.tiny import tiny_folder

    (work / "work").mkdir(parents=True)
    small = Small(work, tiny_folder(work / "model"), write_text(work / "text.jsonl"))
    fit(small(work / "runs", "trainer.max_steps=2"), "small")
    try:
        counts = fuzz(Bench(work / "work", small, work / "runs" / "small" / "buddy" / "seed-0"), examples, seed)
    except Exception:  # any that a command ended with
        print(f"malformed: failed: {traceback.format_exc()}", flush=True)
        return 1
    print("malformed: " + ", ".join(f"{kind}: {count}" for kind, count in counts.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(min(main(), 1))
