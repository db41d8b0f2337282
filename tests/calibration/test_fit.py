"""The probe that `buddy fit` gives to routers."""

import torch

from buddy.calibration import probe
from buddy.calibration.measures import similarities
from buddy.calibration.probe import Probe
from buddy.fit import fit
from buddy.run import load_router
from routers.shortgpt import ShortGPT


def test_it_knows_the_recipe(small, tmp_path, monkeypatch):
    seen: list[Probe] = []
    monkeypatch.setattr(ShortGPT, "calibrate", lambda router, measured: seen.append(measured))
    fit(small(tmp_path, "router=shortgpt", "rivals=[full]", "seed=3", "budgets=[0.5,1.0,0.84]"), "small")
    (measured,) = seen
    assert (measured.asked, measured.seed, measured.prompt, measured.count) == ((5, 3), 3, 12, 6)


def test_another_fit_finds_what_one_measured(small, tmp_path, monkeypatch):
    monkeypatch.setenv("BUDDY_CALIBRATION_CACHE", str(tmp_path / "cache"))
    measured = []
    monkeypatch.setattr(probe, "similarities", lambda *args: measured.append(1) or similarities(*args))
    for name in ("first", "second"):
        fit(small(tmp_path / name, "router=shortgpt", "rivals=[]"), "small")
    assert measured == [1]
    first, second = (
        load_router(tmp_path / name / "small/shortgpt/seed-0")["influence"] for name in ("first", "second")
    )
    assert torch.equal(first, second)
    assert len(list((tmp_path / "cache").glob("*.sqlite"))) == 1
