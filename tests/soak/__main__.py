"""`python -m tests.soak`: kills, and malformed recipes and files, as many as are asked for; 1 where one failed."""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.recovery.malformed import Bench

MALFORMED = "malformed"
WHAT = ("fit", "calibration", "compare", "conversion", "export", MALFORMED)


def main() -> int:
    """Run what was asked for; how many of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition(":")[2].strip())
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="kills, shared among what is killed")
    parser.add_argument("--examples", type=int, default=1000, metavar="N", help="malformed inputs of each kind")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments and of the inputs")
    parser.add_argument("--what", default=",".join(WHAT), metavar="A,B…", help=f"of {', '.join(WHAT)}; all by default")
    asked = parser.parse_args()
    what = [word for word in asked.what.split(",") if word]
    if unknown := {*what} - {*WHAT} or not what:
        parser.error(f"{unknown if what else 'nothing'} is not among {', '.join(WHAT)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="soak-") as work:
        os.environ |= {"BUDDY_CALIBRATION_CACHE": f"{work}/cache/measured", "HF_DATASETS_CACHE": f"{work}/cache/text"}
        killed = [name for name in what if name != MALFORMED]
        failed = sum(not _killed(name, share, asked.seed, Path(work)) for name, share in _shares(killed, asked.kills))
        if MALFORMED in what:
            failed += not _malformed(asked.examples, asked.seed, Path(work))
    return failed


def _shares(names: list[str], kills: int) -> list[tuple[str, int]]:
    return [(name, kills * (i + 1) // len(names) - kills * i // len(names)) for i, name in enumerate(names)]


def _killed(name: str, kills: int, seed: int, work: Path) -> bool:
    import torch

    torch.set_num_threads(1)
    from buddy.console import Bar
    from tests.soak.jobs import JOBS
    from tests.soak.soak import soak
    from tests.soak.victim import Died

    start = time.monotonic()
    try:
        with Bar(f"Kills of {name}", kills) as bar:
            tally = soak(JOBS[name](work / name), kills, seed, bar.update)
    except (AssertionError, Died) as error:
        print(f"{name}: failed: {error}", flush=True)
        return False
    moments = ", ".join(f"{moment}: {count}" for moment, count in tally.moments.most_common())
    spent = time.monotonic() - start
    print(
        f"{name}: {tally.kills} kills in {tally.rounds} rounds of a call of {tally.seconds:.1f} s, {spent:.0f} s in "
        f"all; every result equal to the bit, nothing left over. {moments}",
        flush=True,
    )
    return True


def _malformed(examples: int, seed: int, work: Path) -> bool:
    import traceback

    from tests.recovery.malformed import fuzz

    start = time.monotonic()
    try:
        counts = fuzz(_bench(work / MALFORMED), examples, seed)
    except Exception:  # any that a command ended with
        print(f"{MALFORMED}: failed: {traceback.format_exc()}", flush=True)
        return False
    said = ", ".join(f"{kind}: {count}" for kind, count in counts.items())
    print(f"{MALFORMED}: {said}; no traceback in {time.monotonic() - start:.0f} s", flush=True)
    return True


def _bench(work: Path) -> Bench:
    """A finished run of a trained router, for files to be damaged."""
    from buddy.compare import fit
    from tests.recovery.malformed import Bench
    from tests.soak.jobs import small

    (work / "work").mkdir(parents=True)
    made = small(work)
    with redirect_stdout(io.StringIO()):
        fit(made(work / "runs", "trainer.max_steps=2"), "small")
    return Bench(work / "work", made, work / "runs" / "small" / "buddy" / "seed-0")


if __name__ == "__main__":
    sys.exit(min(main(), 1))
