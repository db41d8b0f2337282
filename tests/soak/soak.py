"""Rounds of kills: a call is killed and repeated until it finishes, and its result held against an undisturbed one."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.soak.jobs import Job, same
from tests.soak.victim import preload, run


@dataclass
class Tally:
    """What a soak of one job came to: kills, finished rounds, seconds of an undisturbed call, where kills fell."""

    kills: int = 0
    rounds: int = 0
    seconds: float = 0.0
    moments: Counter[str] = field(default_factory=Counter)


def soak(job: Job, kills: int, seed: int, on_kill: Callable[[int, str], None] = lambda *_: None) -> Tally:
    """Kill a call so many times, in as many rounds as that takes.

    Args:
        job: the call, and what must hold.
        kills: how many.
        seed: of the moments.
        on_kill: called after each one, with their number and how far the call had got.

    Raises:
        AssertionError: something was corrupt, lost, different or left over.
        Died: a call ended with an error.
    """
    draw, tally = random.Random(f"{seed} {job.name}"), Tally()
    log = job.work / "log"
    job.begin(job.work / "undisturbed")
    preload(job, log)
    first = job.result()
    job.prepare(log)
    job.begin(job.work / "undisturbed-again")
    start = time.monotonic()
    run(job, log)
    tally.seconds = time.monotonic() - start
    expected = job.result()
    assert same(expected, first), "two undisturbed calls differ"
    while tally.kills < kills:
        job.begin(job.work / f"round-{tally.rounds}")
        while not run(job, log, draw.uniform(0, tally.seconds) if tally.kills < kills else None):
            tally.kills += 1
            moment = job.check()
            tally.moments[moment] += 1
            on_kill(tally.kills, moment)
        assert same(job.result(), expected), f"{job.place} differs from an undisturbed call"
        assert not job.leftovers(), f"{job.place} has {', '.join(job.leftovers())} left over"
        shutil.rmtree(job.place)
        tally.rounds += 1
    return tally
