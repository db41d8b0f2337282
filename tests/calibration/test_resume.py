"""A search that is stopped goes on where it was, to the same numbers bit for bit."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from buddy.calibration.probe import Probe
from tests.calibration.small import WINDOWS, count_calls, plans, probe, routed
from tests.documents import ROOT

MODEL = routed()
RUNS = plans(12)
MEASURES = ("block_influence", "angular_distance", "taylor", "loss_increase")


class Shown:
    """A `track` that notes how much there was to do, and stops after some of it."""

    def __init__(self, most: int | None = None) -> None:
        self.most, self.sizes = most, []

    def __call__(self, items, words):
        self.sizes.append(len(items))
        yield from items[: self.most]
        if self.most is not None:
            raise KeyboardInterrupt


def stopped(folder: Path, done: int, runs=RUNS, **options) -> None:
    with pytest.raises(KeyboardInterrupt):
        probe(MODEL, store=folder, track=Shown(done), **options).losses(runs)


@pytest.mark.parametrize("done", [0, 1, 14])
@pytest.mark.parametrize("criterion", ["ce", "kl"])
def test_what_was_measured_is_not_measured_again(tmp_path, done, criterion):
    with pytest.raises(KeyboardInterrupt):
        probe(MODEL, store=tmp_path, track=Shown(done)).losses(RUNS, criterion)
    shown = Shown()
    resumed = probe(MODEL, store=tmp_path, track=shown).losses(RUNS, criterion)
    assert shown.sizes == [len(set(map(tuple, RUNS.tolist()))) * 3 - done]
    assert torch.equal(resumed, probe(MODEL).losses(RUNS, criterion))


def test_a_finished_search_measures_nothing_again(tmp_path):
    first, called = probe(MODEL, store=tmp_path), count_calls(MODEL)
    before = [first.losses(RUNS, "kl"), *(getattr(first, name) for name in MEASURES)]
    assert called
    called.clear()
    second = probe(MODEL, store=tmp_path)
    after = [second.losses(RUNS, "kl"), *(getattr(second, name) for name in MEASURES)]
    assert called == []
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))


def greedy(measured: Probe, removals: int = 3) -> tuple[list[int], list[float]]:
    removed, losses = [], []
    for _ in range(removals):
        left = [index for index in range(4) if index not in removed]
        loss = measured.losses(torch.stack([measured.plan_without([*removed, index]) for index in left])).mean(1)
        removed.append(left[int(loss.argmin())])
        losses.append(loss.min().item())
    return removed, losses


def test_a_greedy_search_stopped_in_any_round_ends_as_an_undisturbed_one(tmp_path):
    undisturbed = greedy(probe(MODEL))
    for turn in range(3):
        with pytest.raises(KeyboardInterrupt):
            greedy(probe(MODEL, store=tmp_path, track=Shown(2 + turn)))
    assert greedy(probe(MODEL, store=tmp_path)) == undisturbed


def test_the_first_round_of_a_greedy_search_is_the_rise_without_one_layer(tmp_path):
    _ = probe(MODEL, store=tmp_path).loss_increase
    shown = Shown()
    greedy(probe(MODEL, store=tmp_path, track=shown), removals=1)
    assert shown.sizes == []


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"windows": WINDOWS + 1}, {"windows": WINDOWS[:4]}])
def test_other_windows_and_batches_are_measured_for_themselves(tmp_path, options):
    stopped(tmp_path, 5)
    shown = Shown()
    probe(MODEL, store=tmp_path, track=shown, **options).losses(RUNS[:1])
    assert shown.sizes == [2 if len(options.get("windows", WINDOWS)) == 4 or "batch_size" in options else 3]
    assert len(list(tmp_path.glob("*.sqlite"))) == 2


def test_damage_costs_time_only(tmp_path, capfd):
    stopped(tmp_path, 9)
    (path,) = tmp_path.glob("*.sqlite")
    path.write_bytes(path.read_bytes()[:5000])
    shown = Shown()
    resumed = probe(MODEL, store=tmp_path, track=shown).losses(RUNS)
    assert torch.equal(resumed, probe(MODEL).losses(RUNS))
    assert "is damaged" in capfd.readouterr().err


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from buddy.calibration import store
from tests.calibration.small import plans, probe
store.WRITE_EVERY = 0.0

def track(items, words):
    yield from items[:7]
    os.kill(os.getpid(), signal.SIGKILL)

probe(store=Path(sys.argv[1]), track=track).losses(plans(12))
"""


def test_a_kill_costs_only_what_was_not_written(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    shown = Shown()
    resumed = probe(MODEL, store=tmp_path, track=shown).losses(RUNS)
    assert shown.sizes == [len(set(map(tuple, RUNS.tolist()))) * 3 - 7]
    assert torch.equal(resumed, probe(MODEL).losses(RUNS))
