"""Bridges through `buddy fit`: fitted for every router, saved, loaded, carried, trained with an adapter, refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import buddy
from buddy import fit as fit_module
from buddy.builders.model import load_model
from buddy.compare import fit
from buddy.errors import BuddyError, DamagedError, RunError
from buddy.hub.export import export_run
from buddy.hub.push_pull import pull, push
from buddy.io import load_tensors
from buddy.run import read_run
from buddy.run_files import BRIDGE, update_checksums
from buddy.training.healing import HealingModule
from buddy.training.module import RoutingModule
from tests.small import only_seeds
from tests.training.stopping import at_step, interrupt, same

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def with_bridges(small, tmp_path_factory):
    """Runs of four routers with bridges; read them, never write into them."""
    output = tmp_path_factory.mktemp("bridges")
    fit(small(output, "bridge.rank=8", "rivals=[shortgpt,random,first,full]"), "small")
    return only_seeds(output / "small")


def kl(folder, budget: float) -> float:
    results = json.loads((folder / "metrics.json").read_text())["results"]
    return next(each["kl"] for each in results if each["budget"] == budget)


def test_every_router_that_skips_has_them_and_they_help(with_bridges, finished):
    for name in ("buddy", "shortgpt", "random", "first"):
        assert load_tensors(with_bridges / name / BRIDGE)["fitted"].any()
        assert kl(with_bridges / name, 1.0) == pytest.approx(0, abs=1e-5)
    assert not (with_bridges / "full" / BRIDGE).exists()
    for name in ("shortgpt", "random"):
        assert kl(with_bridges / name, 0.5) < kl(finished / name, 0.5)


@pytest.mark.parametrize(("router", "first"), [("skipgpt", [6]), ("buddy", [4, 3])])
def test_gates_begin_with_bridges_of_all_layers_and_equal_counts_are_fitted_once(
    small, tmp_path, monkeypatch, router, first
):
    planned, fit_bridges = [], fit_module.fit_bridges

    def fitting(model, windows, executed, **options):
        planned.append(list(executed))
        return fit_bridges(model, windows, executed, **options)

    monkeypatch.setattr(fit_module, "fit_bridges", fitting)
    overrides = [f"router={router}", "rivals=[]", "bridge.rank=4", "trainer.max_steps=2"]
    fit(small(tmp_path, *overrides, "budgets=[1.0,0.75,0.55,0.5]"), "small")
    assert planned == [first, [4, 3]], "before the training, and after it"
    assert load_tensors(tmp_path / "small" / router / "seed-0" / BRIDGE)["fitted"].any()


def test_a_loaded_run_computes_with_them(with_bridges, tmp_path):
    run = read_run(with_bridges / "shortgpt")
    model, executed = load_model(run), torch.tensor([3, 4])
    logits = model(IDS, executed=executed).logits
    assert torch.equal(model.bridges.up, load_tensors(run.folder / BRIDGE)["up"])
    model.bridge(None)
    assert not torch.equal(model(IDS, executed=executed).logits, logits)
    push(run.folder, to=str(tmp_path / "pushed"))
    pull(str(tmp_path / "pushed"), out=tmp_path / "pulled")
    pulled = buddy.load(tmp_path / "pulled").routed
    assert torch.equal(pulled(IDS, executed=executed).logits, logits)


@pytest.mark.parametrize("adapter", [(), ("adapter.steps=3",), ("adapter.steps=3", "adapter.joint=true")])
def test_steps_train_them_by_gradients(small, tmp_path, adapter):
    overrides = ["bridge.rank=8", "rivals=[]", "trainer.max_steps=4", *adapter]
    for steps in (0, 4):
        fit(small(tmp_path / str(steps), *overrides, f"bridge.steps={steps}"), "small")
    fixed, trained = (load_tensors(tmp_path / str(steps) / "small/buddy/seed-0" / BRIDGE) for steps in (0, 4))
    run = read_run(tmp_path / "4/small/buddy/seed-0")
    model, rate = load_model(run), run.recipe.bridge.lr
    for name in ("down", "up", "bias"):
        assert 0 < (fixed[name] - trained[name]).abs().max() < 1.01 * 4 * rate  # a step of Adam is at most its rate
    assert not any(parameter.requires_grad for parameter in model.bridges.parameters())
    assert (model.adapter is not None) == bool(adapter)
    assert adapter or kl(run.folder, 1.0) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("router", ["shortgpt", "buddy"])
def test_their_training_resumes(small, tmp_path, monkeypatch, capsys, router):
    overrides = ["bridge.rank=8", "bridge.steps=6", f"router={router}", "rivals=[]", "checkpoint_every=1"]
    fit(small(tmp_path / "whole", *overrides), "small")
    with monkeypatch.context() as patch:
        at_step(patch, HealingModule, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(small(tmp_path / "parts", *overrides), "small")
    capsys.readouterr()
    fit(small(tmp_path / "parts", *overrides), "small")
    said, folder = capsys.readouterr().err, tmp_path / "parts" / "small" / router / "seed-0"
    assert "healing.ckpt" in said
    assert "Fitting bridges" not in said, "what was fitted before their training is on disk"
    assert "Training buddy" not in said
    assert not (folder / "checkpoints" / "fitted").exists()
    first, second = (
        load_tensors(tmp_path / name / "small" / router / "seed-0" / BRIDGE) for name in ("whole", "parts")
    )
    assert all(torch.equal(second[key], tensor) for key, tensor in first.items())


def test_what_was_fitted_before_their_training_is_fitted_again_if_it_is_damaged(small, tmp_path, monkeypatch):
    overrides = ["bridge.rank=8", "bridge.steps=4", "router=shortgpt", "rivals=[]", "checkpoint_every=1"]
    folder = Path("small/shortgpt/seed-0")
    fit(small(tmp_path / "whole", *overrides), "small")
    with monkeypatch.context() as patch:
        at_step(patch, HealingModule, 2, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(small(tmp_path / "parts", *overrides), "small")
    router = tmp_path / "parts" / folder / "checkpoints" / "fitted" / "router.safetensors"
    content = router.read_bytes()
    router.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fit(small(tmp_path / "parts", *overrides), "small")
    for name in (BRIDGE, "router.safetensors"):
        assert same(*(load_tensors(tmp_path / each / folder / name) for each in ("whole", "parts")))


def test_beside_an_adapter_joint_training_goes_on_without_steps_of_their_own(small, tmp_path):
    overrides = ["bridge.rank=8", "bridge.steps=0", "adapter.steps=2", "router=shortgpt", "rivals=[]"]
    for joint in ("true", "false"):
        fit(small(tmp_path / joint, *overrides, f"bridge.joint={joint}"), "small")
    assert not same(*(load_tensors(tmp_path / each / "small/shortgpt/seed-0" / BRIDGE) for each in ("true", "false")))


def test_the_router_s_steps_may_train_them_too_and_resume(small, tmp_path, monkeypatch, capsys):
    overrides = ["bridge.rank=8", "bridge.joint=true", "objective.estimator=surrogate", "rivals=[]"]
    overrides += ["trainer.max_steps=6", "checkpoint_every=1"]
    fit(small(tmp_path / "whole", *overrides), "small")
    assert capsys.readouterr().err.count("Fitting bridges") == 1, "they stay as trained"
    with monkeypatch.context() as patch:
        at_step(patch, RoutingModule, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(small(tmp_path / "parts", *overrides), "small")
    fit(small(tmp_path / "parts", *overrides), "small")
    fit(small(tmp_path / "alone", *overrides, "trainer.max_steps=0"), "small")
    whole, parts, start = (
        load_tensors(tmp_path / name / "small/buddy/seed-0" / BRIDGE) for name in ("whole", "parts", "alone")
    )
    assert all(torch.equal(parts[key], tensor) for key, tensor in whole.items())
    for name in ("down", "up", "bias"):
        assert 0 < (whole[name] - start[name]).abs().max() < 1.01 * 6 * 1e-3  # a step of Adam is at most its rate


def test_bridges_of_a_router_without_steps_are_trained_for_as_many(small, tmp_path, monkeypatch):
    common, steps = ["bridge.rank=8", "rivals=[]", "objective.estimator=surrogate"], []
    joint = [*common, "bridge.joint=true", "bridge.steps=2", "trainer.max_steps=4"]
    fit(small(tmp_path / "joint", *joint, "router=shortgpt"), "small")
    fit(small(tmp_path / "alone", *common, "router=shortgpt", "bridge.steps=6"), "small")
    one, other = (load_tensors(tmp_path / name / "small/shortgpt/seed-0" / BRIDGE) for name in ("joint", "alone"))
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())
    counted = HealingModule.training_step
    monkeypatch.setattr(HealingModule, "training_step", lambda self, *args: steps.append(None) or counted(self, *args))
    fit(small(tmp_path / "buddy", *joint), "small")
    assert len(steps) == 2, "a router with steps of its own has no more than asked for after them"


def test_too_few_tokens_leave_nothing_to_train(small, tmp_path, capsys):
    overrides = ["bridge.rank=8", "bridge.windows=1", "budgets=[1.0,0.5]", "router=shortgpt", "rivals=[]"]
    fit(small(tmp_path, *overrides, "bridge.steps=3"), "small")
    assert "Training the bridges" not in capsys.readouterr().err
    assert not load_tensors(tmp_path / "small/shortgpt/seed-0" / BRIDGE)["fitted"].any()


def test_a_run_at_full_depth_alone_reads_back(small, tmp_path):
    fit(small(tmp_path, "bridge.rank=8", "router=shortgpt", "rivals=[]", "budgets=[1.0]"), "small")
    assert not load_model(read_run(tmp_path / "small/shortgpt/seed-0")).bridges.fitted.any()


def test_training_them_lowers_the_kl(small, with_bridges, tmp_path):
    trained = ["bridge.rank=8", "bridge.steps=60", "bridge.lr=1e-2"]
    fit(small(tmp_path, "router=shortgpt", "rivals=[]", *trained), "small")
    assert kl(tmp_path / "small/shortgpt/seed-0", 0.5) < kl(with_bridges / "shortgpt", 0.5)


# Refusals


def test_export_refuses_bridges(with_bridges, tmp_path):
    with pytest.raises(RunError, match="bridge=null"):
        export_run(with_bridges / "shortgpt", budget="0.5", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["cut", "missing", "foreign", "rank"])
def test_a_damaged_file_is_refused(with_bridges, tmp_path, damage):
    folder = shutil.copytree(with_bridges / "shortgpt", tmp_path / "run")
    path = folder / BRIDGE
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "missing":
        path.unlink()
    elif damage == "foreign":
        shutil.copy(folder / "router.safetensors", path)
    else:
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("rank: 8", "rank: 9"))
    with pytest.raises(BuddyError):
        load_model(read_run(folder))
    if damage in ("foreign", "rank"):  # with checksums that fit
        update_checksums(folder)
        with pytest.raises(DamagedError, match=BRIDGE):
            load_model(read_run(folder))
