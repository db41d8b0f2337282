"""Healing as a part of `fit` and `compare`: what is left, what is read back, what goes on, what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.builders.data import build_data
from buddy.builders.model import load_model
from buddy.compare import CompareConfig, compare, fit
from buddy.errors import RunError
from buddy.evaluation.evaluate import evaluate
from buddy.io import load_tensors, save_tensors
from buddy.router import available_budgets
from buddy.run import RunFolder, read_run
from buddy.run_files import checksums_of, load_router, read_metrics
from buddy.schema import Rival
from buddy.training.healing import HealingModule
from tests.adapted import IDS
from tests.asking import ask
from tests.small import only_seeds, write_text
from tests.training.stopping import Killed, at_step, interrupt, kill, same

pytestmark = pytest.mark.slow

STEPS = 7
HEALED = [f"adapter.steps={STEPS}", "adapter.lr=0.02", "adapter.rank=2"]
BRIEFLY = ["trainer.max_steps=1", "objective.plans=2", "budgets=[1.0,0.5]"]  # where the router does not matter
NAMES = ("buddy", "shortgpt", "full")
SIZE = 5 * 2 * (4 * (64 + 64) - 2 * 32 + 3 * (64 + 128))  # of an adapter of rank 2


@pytest.fixture(scope="module")
def healed(small, tmp_path_factory) -> Path:
    """Runs of two routers, healed, and of one that there is nothing to heal of; read them, never write into them."""
    output = tmp_path_factory.mktemp("healed")
    fit(small(output, "rivals=[shortgpt,full]", *HEALED), "small")
    return only_seeds(output / "small")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter that is saved in a run folder."""
    return load_tensors(folder / "adapter" / "adapter_model.safetensors")


# Whole


def test_every_router_that_skips_layers_has_an_adapter_beside_the_unhealed_router(healed, finished):
    for name in NAMES:
        heals = name != "full"
        found = {path.name for path in (healed / name).iterdir()}
        assert ("adapter" in found) == heals
        assert ("checkpoints" in found) == (name == "buddy"), "the checkpoint of a finished healing is not kept"
        assert sum(key.startswith("adapter/") for key in checksums_of(healed / name)) == 3 * heals
        before = read_metrics(finished / name)["fit"]["parameters"]
        assert read_metrics(healed / name)["fit"]["parameters"] == before + SIZE * heals
        assert same(*(load_router(runs / name) for runs in (healed, finished)))
        if heals:
            events = EventAccumulator(str(healed / name)).Reload()
            tags = {"heal/objective", "heal/gradient_norm", "heal/objective_3_layers"}
            assert tags <= set(events.Tags()["scalars"])
            assert [point.step for point in events.Scalars("heal/objective")] == [1, 3, 5]
    assert [path.name for path in (healed / "buddy" / "checkpoints").iterdir()] == ["last.ckpt"]


def test_healing_helps_and_full_depth_of_each_run_is_its_own(healed, finished):
    for name in ("buddy", "shortgpt"):
        ours, theirs = (read_metrics(runs / name)["results"] for runs in (healed, finished))
        assert all(mine["perplexity"] < other["perplexity"] for mine, other in zip(ours, theirs, strict=True))
        assert ours[0]["layers"] == 6
        assert ours[0]["kl"] > 1e-4, "against the stock model, which it no longer is"
        assert theirs[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert read_metrics(healed / "full")["results"][0]["kl"] == pytest.approx(0, abs=1e-5)


def test_joint_training_moves_both(small, healed, tmp_path):
    fit(small(tmp_path, "rivals=[shortgpt]", "adapter.joint=true", *HEALED), "small")
    runs = (healed / "buddy", tmp_path / "small" / "buddy" / "seed-0")
    first, joint = map(load_router, runs)
    assert not torch.equal(first["output.weight"], joint["output.weight"])
    assert {path.name for path in (tmp_path / "small" / "buddy" / "seed-0").iterdir()}.isdisjoint({"checkpoints"})
    assert same(weights(healed / "shortgpt"), weights(tmp_path / "small" / "shortgpt" / "seed-0"))


# Read back


@pytest.mark.parametrize("name", ["buddy", "shortgpt"])
def test_a_run_is_read_as_it_was_measured(healed, name):
    run = read_run(healed / name)
    routed = load_model(run)
    data = build_data(run.recipe, routed.backbone)
    data.prepare_data()
    data.setup()
    scores = evaluate(routed, data.test, available_budgets(routed.router, run.recipe.budgets), prompt=12)
    for found, saved in zip(scores, read_metrics(healed / name)["results"], strict=True):
        assert found.perplexity == pytest.approx(saved["perplexity"], rel=1e-6)
        assert found.mean_kl == pytest.approx(saved["kl"], abs=1e-6)
    merged = load_model(run, merged=True)
    assert merged.adapter is None
    executed = torch.tensor([3, 4, 6])
    torch.testing.assert_close(merged(IDS, executed=executed).logits, routed(IDS, executed=executed).logits)


def test_commands_take_a_healed_run(healed, tmp_path):
    run = ["--run", shutil.copytree(healed / "shortgpt", tmp_path / "run")]
    assert ask("evaluate", *run, "--budgets", "0.5", "--json", tmp_path / "one.json") is None
    assert ask("generate", *run, "--budget", "0.5", "--max-new-tokens", "3", "budget layer") is None
    assert ask("inspect", *run, "--budgets", "0.5", "--windows", "1") is None
    found = json.loads((tmp_path / "one.json").read_text())["results"][0]
    saved = read_metrics(healed / "shortgpt")["results"][-1]
    assert (found["layers"], found["perplexity"]) == (saved["layers"], pytest.approx(saved["perplexity"]))


def test_compare_heals_by_the_same_code_and_each_seed(small, healed, tmp_path):
    recipe = small(tmp_path, *HEALED)
    routers = [Rival("shortgpt"), Rival("full")]
    config = CompareConfig(recipe, "small", routers=routers, seeds=2, out=tmp_path / "out", speed=False)
    text = write_text(tmp_path / "other.jsonl", 40, seed=5)
    other = replace(config, texts=str(text))
    assert compare(config) == compare(other) == 0  # the second finds the runs finished and reads them
    runs = tmp_path / "out"
    assert same(weights(healed / "shortgpt"), weights(runs / "shortgpt" / "seed-0"))
    assert (runs / "shortgpt" / "seed-1" / "run.json").exists()
    assert not (runs / "full" / "seed-1").exists()
    kept = json.loads((runs / "shortgpt" / "seed-0" / "evaluations" / "other.json").read_text())
    assert len(kept["adapter"]) == 64
    with pytest.raises(RunError, match=r"adapter\.rank: 2 there, 3 here"):
        compare(replace(config, recipe=small(tmp_path, *HEALED, "adapter.rank=3")))


# Stopped


@pytest.mark.parametrize(
    ("name", "act", "raised", "kept"), [("buddy", interrupt, KeyboardInterrupt, 5), ("shortgpt", kill, Killed, 3)]
)
def test_what_was_stopped_goes_on_bit_for_bit(small, healed, tmp_path, monkeypatch, capsys, name, act, raised, kept):
    partial = tmp_path / "small" / name / "seed-0" / "checkpoints"
    with monkeypatch.context() as patch:
        at_step(patch, HealingModule, 5, act)
        with pytest.raises(raised):
            fit(small(tmp_path, f"router={name}", *HEALED), "small")
    assert torch.load(partial / "healing.ckpt", weights_only=True)["global_step"] == kept
    capsys.readouterr()
    fit(small(tmp_path, f"router={name}", *HEALED), "small")
    said = capsys.readouterr().err
    assert str(partial / "healing.ckpt") in said
    assert f"Healing {name}: {STEPS} of {STEPS}" in said
    assert "Training buddy" not in said
    assert same(weights(healed / name), weights(tmp_path / "small" / name / "seed-0"))
    assert read_metrics(tmp_path / "small" / name / "seed-0")["results"] == read_metrics(healed / name)["results"]


def test_a_kill_in_the_evaluation_costs_no_step(small, healed, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("buddy.fit.evaluate", lambda *_, **__: kill())
        with pytest.raises(Killed):
            fit(small(tmp_path, *HEALED), "small")
    capsys.readouterr()
    fit(small(tmp_path, *HEALED), "small")
    said = capsys.readouterr().err
    assert "Training buddy" not in said
    assert "Healing buddy" not in said
    assert same(weights(healed / "buddy"), weights(tmp_path / "small" / "buddy" / "seed-0"))


def test_a_run_that_cannot_be_completed_is_not_healed_again(small, tmp_path, monkeypatch, capsys):
    def full(*_) -> None:
        raise RunError("The disk is full.")

    recipe = small(tmp_path, *HEALED, *BRIEFLY, "router=shortgpt", "rivals=[]")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "complete", full)
        with pytest.raises(RunError):
            fit(recipe, "small")
    assert "Healing shortgpt" in capsys.readouterr().err
    fit(recipe, "small")
    assert "Healing shortgpt" not in capsys.readouterr().err
    assert not (read_run(tmp_path / "small" / "shortgpt").folder / "checkpoints").exists()


def test_a_trained_router_is_healed_without_training_it_again(small, finished, healed, tmp_path, capsys):
    checkpoint = finished / "buddy" / "checkpoints" / "last.ckpt"
    fit(small(tmp_path, f"ckpt_path={checkpoint}", *HEALED), "small")
    assert "Training buddy" not in capsys.readouterr().err
    assert same(weights(healed / "buddy"), weights(tmp_path / "small" / "buddy" / "seed-0"))
    own = tmp_path / "small" / "buddy" / "seed-0" / "checkpoints" / "last.ckpt"
    again = small(tmp_path, f"ckpt_path={own}", *HEALED, "adapter.lr=1e-4")
    for _ in range(2):  # the new run, in the same place, keeps what it began from
        fit(again, "small")
        assert "Training buddy" not in capsys.readouterr().err
        assert own.read_bytes() == checkpoint.read_bytes()


# Wrong


def test_a_named_checkpoint_keeps_the_router_and_not_the_healing(small, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, HealingModule, 5, kill)
        with pytest.raises(Killed):
            fit(small(tmp_path, *HEALED, *BRIEFLY), "small")
    named = f"ckpt_path={tmp_path / 'small' / 'buddy' / 'seed-0' / 'checkpoints' / 'last.ckpt'}"
    capsys.readouterr()
    fit(small(tmp_path, *HEALED, *BRIEFLY, named, "adapter.lr=0.01"), "small")
    said = capsys.readouterr().err
    assert "healing.ckpt" not in said
    assert "Training buddy" not in said


def double(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_tensors(path, {name: 2 * value for name, value in load_tensors(path).items()})


def change_backbone(adapter: Path) -> None:
    (adapter / "backbone.json").write_text(json.dumps({"name": "other", "fingerprint": "f00d"}))
    facts = json.loads((adapter.parent / "run.json").read_text())
    (adapter.parent / "run.json").write_text(json.dumps({**facts, "checksums": {}}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (double, r"adapter_model\.safetensors"),
        (shutil.rmtree, r"backbone\.json"),
        (change_backbone, "other, fingerprint f00d"),
    ],
)
def test_a_changed_missing_or_foreign_adapter_is_refused(healed, tmp_path, damage, named):
    folder = shutil.copytree(healed / "shortgpt", tmp_path / "run")
    damage(folder / "adapter")
    with pytest.raises(RunError, match=named):
        load_model(read_run(folder))
