"""`adapter.rates`: each is tried, validation windows decide, and what was tried is not tried again."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.errors import RecipeError, TrainingError
from buddy.evaluation.evaluate import evaluate_run
from buddy.fit import fit
from buddy.healing import rates
from buddy.training.healing import HealingModule
from tests.healing.made import Killed, assert_same, kill, metrics, weights

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS = 7
RATES = [0.0001, 0.02, 0.001]
HEALED = [f"adapter.steps={STEPS}", "adapter.rank=2"]
TRIED = [*HEALED, f"adapter.rates={RATES}"]
ONE = "router=shortgpt"


@pytest.fixture(scope="module")
def tried(small, tmp_path_factory) -> Path:
    """A run healed at the best of three rates; read it, never write into it."""
    output = tmp_path_factory.mktemp("tried")
    fit(small(output, ONE, *TRIED), "small")
    return output / "small" / "shortgpt" / "seed-0"


def test_the_adapter_is_that_of_the_best_rate_alone(small, tried, tmp_path):
    found = metrics(tried)
    best = found["fit"]["adapter_lr"]
    assert [*found["rates"]] == [str(rate) for rate in RATES]
    assert found["rates"][str(best)] == min(found["rates"].values())
    assert len({*found["rates"].values()}) == len(RATES)
    fit(small(tmp_path, ONE, *HEALED, f"adapter.lr={best}"), "small")
    assert_same(*map(weights, (tried, tmp_path / "small" / "shortgpt" / "seed-0")))
    assert metrics(tmp_path / "small" / "shortgpt" / "seed-0")["results"] == found["results"]


def test_what_is_compared_is_the_objective_on_validation_windows(small, tried, tmp_path):
    found = metrics(tried)
    for rate in RATES:
        fit(small(tmp_path, ONE, *HEALED, f"adapter.lr={rate}"), "small")
        file = tmp_path / "validation.json"
        evaluate_run(tmp_path / "small" / "shortgpt" / "seed-0", split="validation", json_file=file)
        results = json.loads(file.read_text())["results"]
        assert sum(each["kl"] for each in results) / len(results) == pytest.approx(found["rates"][str(rate)], rel=1e-6)


def test_curves_of_all_rates_stay_and_nothing_else(tried):
    for rate in RATES:
        place = tried / "rates" / str(rate)
        assert all(path.name.startswith(("events", "hparams")) for path in place.iterdir())
        events = EventAccumulator(str(place)).Reload()
        assert [point.step for point in events.Scalars("heal/objective")] == [1, 3, 5]


def test_what_was_tried_is_not_tried_again(small, tried, tmp_path, monkeypatch):
    """Stopped in the second rate: the first is kept, the second goes on from its checkpoint."""
    steps, healing = [], HealingModule._healing

    def counted(self, *args):
        steps.append(self.settings["lr"])
        if len(steps) == STEPS + 5:
            raise Killed
        return healing(self, *args)

    monkeypatch.setattr(HealingModule, "_healing", counted)
    with pytest.raises(Killed):
        fit(small(tmp_path, ONE, *TRIED), "small")
    fit(small(tmp_path, ONE, *TRIED), "small")
    assert [steps[STEPS + 5 :].count(rate) for rate in RATES] == [0, STEPS - 3, STEPS]
    assert_same(*map(weights, (tried, tmp_path / "small" / "shortgpt" / "seed-0")))
    assert metrics(tmp_path / "small" / "shortgpt" / "seed-0")["rates"] == metrics(tried)["rates"]


def diverging(monkeypatch, least: float) -> None:
    healing = HealingModule._healing

    def broken(self, *args):
        factor = float("nan") if self.settings["lr"] >= least else 1.0
        return [part * factor for part in healing(self, *args)]

    monkeypatch.setattr(HealingModule, "_healing", broken)


def test_a_rate_that_diverges_is_left_out_and_said(small, tmp_path, monkeypatch, capsys):
    diverging(monkeypatch, 0.01)
    fit(small(tmp_path, ONE, *TRIED), "small")
    assert "Left out a rate of 0.02: Healing stopped at step 1" in capsys.readouterr().err
    found = metrics(tmp_path / "small" / "shortgpt" / "seed-0")
    assert found["rates"]["0.02"] is None
    assert found["fit"]["adapter_lr"] == 0.001


def test_an_interrupt_in_the_step_that_is_not_finite_is_not_lost(small, tmp_path, monkeypatch, capsys):
    healing, steps = HealingModule._healing, []

    def broken(self, *args):
        steps.append(self.settings["lr"])
        os.kill(os.getpid(), signal.SIGINT)
        return [part * math.nan for part in healing(self, *args)]

    monkeypatch.setattr(HealingModule, "_healing", broken)
    with pytest.raises(KeyboardInterrupt):
        fit(small(tmp_path, ONE, *TRIED), "small")
    assert steps == RATES[:1], "the next rate is not begun"
    assert "the loss is not finite" in capsys.readouterr().err


def test_no_rate_that_stays_finite_is_a_sentence_and_the_router_can_be_kept(small, tmp_path, monkeypatch, capsys):
    briefly = ["trainer.max_steps=1", "objective.plans=2", "budgets=[1.0,0.5]"]
    with monkeypatch.context() as patch:
        diverging(patch, 0.0)
        with pytest.raises(
            TrainingError, match=r"at none of adapter.rates; give lower ones, and trainer.ckpt_path=.*last.ckpt"
        ):
            fit(small(tmp_path, *briefly, *TRIED), "small")
    checkpoint = tmp_path / "small" / "buddy" / "seed-0" / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    fit(small(tmp_path, *briefly, *HEALED, "adapter.rates=[0.0005]", f"trainer.ckpt_path={checkpoint}"), "small")
    assert "Training buddy" not in capsys.readouterr().err


def test_an_objective_that_is_no_number_loses(small, tmp_path, monkeypatch, capsys):
    """The rate is the first one, where a plain `min` would keep it."""
    measure = rates.evaluate

    seen = []

    def measured(routed, *args, **options):
        scores = measure(routed, *args, **options)
        seen.append(None)
        return [replace(each, kl=each.kl * math.nan) for each in scores] if len(seen) == 1 else scores

    monkeypatch.setattr(rates, "evaluate", measured)
    fit(small(tmp_path, ONE, *HEALED, "adapter.rates=[0.02,0.001]"), "small")
    assert "Left out a rate of 0.02: its objective on validation windows is not finite" in capsys.readouterr().err
    found = metrics(tmp_path / "small" / "shortgpt" / "seed-0")
    assert found["fit"]["adapter_lr"] == 0.001
    assert found["rates"]["0.02"] is None


def test_what_was_tried_for_another_recipe_is_tried_again(small, tmp_path, monkeypatch):
    """A named checkpoint keeps an unfinished folder whatever else of the recipe changed."""
    briefly = ["trainer.max_steps=1", "objective.plans=2"]
    with monkeypatch.context() as patch:
        patch.setattr("buddy.fit.save_router", lambda *_: kill())
        with pytest.raises(Killed):
            fit(small(tmp_path, *briefly, *TRIED), "small")
    partial = tmp_path / "small" / "buddy" / "seed-0"
    assert (partial / "rates" / "0.02" / "validation.json").exists()
    named = f"trainer.ckpt_path={partial / 'checkpoints' / 'last.ckpt'}"
    steps, healing = [], HealingModule._healing

    def counted(self, *args):
        steps.append(self.settings["lr"])
        return healing(self, *args)

    monkeypatch.setattr(HealingModule, "_healing", counted)
    fit(small(tmp_path, *briefly, *TRIED, named, "objective.ce=1.0"), "small")
    assert [steps.count(rate) for rate in RATES] == [STEPS] * 3


def test_a_tried_adapter_that_was_damaged_is_tried_again(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("buddy.fit.save_router", lambda *_: kill())
        with pytest.raises(Killed):
            fit(small(tmp_path, ONE, *TRIED), "small")
    place = tmp_path / "small" / "shortgpt" / "seed-0" / "rates" / "0.02" / "adapter"
    (place / "adapter_model.safetensors").write_bytes(b"cut")
    fit(small(tmp_path, ONE, *TRIED), "small")
    assert metrics(tmp_path / "small" / "shortgpt" / "seed-0")["fit"]["adapter_lr"] == 0.02


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rates=[0.1,0]", r"adapter.rates holds 0.0, but each must be a number above 0"),
        ("adapter.rates=[0.1,0.1]", r"adapter.rates holds 0.1 more than once"),
        ("adapter={rates: [0.1], joint: true}", r"rates are tried with one and the same router; leave them out"),
    ],
)
def test_mistakes(small, tmp_path, override, said):
    with pytest.raises(RecipeError, match=said):
        small(tmp_path, override)
