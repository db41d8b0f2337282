"""An interrupted search resumes when it is asked again, with the same numbers bit for bit."""

import os
import signal
from pathlib import Path

import pytest
import torch

from buddy import measurements
from buddy.calibration.measures import similarities
from buddy.compare import fit
from buddy.io import load_tensors
from routers.shortgpt import ShortGPT
from tests.calibration.small import WINDOWS, count_calls, plans, probe, routed
from tests.small import Forked

MODEL = routed()
RUNS = plans(12)
PAIRS = len(set(map(tuple, RUNS.tolist()))) * 3  # plans × batches
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


@pytest.fixture(scope="module")
def undisturbed():
    return {criterion: probe(MODEL).losses(RUNS, criterion) for criterion in ("ce", "kl")}


@pytest.mark.parametrize(("criterion", "done"), [("ce", 0), ("ce", 14), ("kl", 1)])
def test_what_was_measured_is_not_measured_again(tmp_path, undisturbed, criterion, done):
    with pytest.raises(KeyboardInterrupt):
        probe(MODEL, store=tmp_path, track=Shown(done)).losses(RUNS, criterion)
    shown = Shown()
    resumed = probe(MODEL, store=tmp_path, track=shown).losses(RUNS, criterion)
    assert shown.sizes == [PAIRS - done]
    assert torch.equal(resumed, undisturbed[criterion])


def test_a_finished_search_measures_nothing_again(tmp_path):
    first, called = probe(MODEL, store=tmp_path), count_calls(MODEL)
    before = [first.losses(RUNS, "kl"), *(getattr(first, name) for name in MEASURES)]
    assert called
    called.clear()
    second = probe(MODEL, store=tmp_path)
    after = [second.losses(RUNS, "kl"), *(getattr(second, name) for name in MEASURES)]
    assert called == []
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("options", [{"batch_size": 3}, {"windows": WINDOWS + 1}])
def test_other_windows_and_batches_are_measured_for_themselves(tmp_path, options):
    probe(MODEL, store=tmp_path).losses(RUNS[:1])
    shown = Shown()
    probe(MODEL, store=tmp_path, track=shown, **options).losses(RUNS[:1])
    assert shown.sizes == [2 if "batch_size" in options else 3]
    assert len(list(tmp_path.glob("*.txt"))) == 2


def killed(store: Path) -> None:
    """A search that is killed in the middle, and writes whatever it measures at once."""

    def track(items, words):
        yield from items[:7]
        os.kill(os.getpid(), signal.SIGKILL)

    measurements.WRITE_EVERY = 0.0
    probe(MODEL, store=store, track=track).losses(RUNS)


def test_a_kill_costs_only_what_was_not_written(tmp_path, undisturbed):
    process = Forked(killed, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    shown = Shown()
    resumed = probe(MODEL, store=tmp_path, track=shown).losses(RUNS)
    assert shown.sizes == [PAIRS - 7]
    assert torch.equal(resumed, undisturbed["ce"])


# `buddy fit`


@pytest.mark.slow
def test_the_probe_knows_the_recipe_and_the_next_fit_finds_what_one_measured(small, tmp_path, monkeypatch):
    monkeypatch.setenv("BUDDY_CALIBRATION_CACHE", str(tmp_path / "cache"))
    probes, measured = [], []
    calibrate = ShortGPT.calibrate
    monkeypatch.setattr(ShortGPT, "calibrate", lambda self, given: probes.append(given) or calibrate(self, given))
    monkeypatch.setattr("buddy.calibration.probe.similarities", lambda *args: measured.append(1) or similarities(*args))
    for name in ("first", "second"):
        fit(small(tmp_path / name, "router=shortgpt", "rivals=[]", "seed=3", "budgets=[0.5,1.0,0.84]"), "small")
    assert measured == [1]
    assert {(each.layer_counts, each.seed, each.prompt, each.count) for each in probes} == {((5, 3), 3, 12, 6)}
    first, second = (load_tensors(path)["influence"] for path in tmp_path.rglob("router.safetensors"))
    assert torch.equal(first, second)
