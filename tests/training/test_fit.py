"""`fit` as a whole: run folders for a router and its rivals, and what is left when it is stopped or killed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from buddy.compare import fit
from buddy.config import load_recipe
from buddy.errors import BuddyError, BudgetError, DataError, RecipeError, RegistryError, RunError, TrainingError
from buddy.run import read_run
from buddy.run_files import load_router, read_metrics
from tests.small import Forked, contents, fork_buddy, wait_until
from tests.training.stopping import assert_same_training, last, same

ROUTERS = ["buddy", "shortgpt", "uniform", "random", "full"]
BESIDE = {"comparison.json", "comparison.csv", "results.md", "quality-layers.png", "tensorboard"}  # the runs
FILES = {"recipe.yaml", "inputs.json", "run.json", "router.safetensors", "metrics.json", "loss.png"}


def names(folder: Path) -> set[str]:
    """What lies in a folder, locks and the files of TensorBoard apart."""
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock") and "tfevents" not in path.name}


# Whole


def test_a_run_folder_for_every_router(finished):
    assert names(finished) == {*ROUTERS, *BESIDE}
    for name in ROUTERS:
        trained = {"checkpoints", "hparams.yaml"} if name == "buddy" else set()
        assert names(finished / name) == FILES | trained
        run = read_run(finished / name)
        assert (run.recipe_name, run.router_name) == ("small", name)
        budgets = [result["budget"] for result in json.loads((finished / name / "metrics.json").read_text())["results"]]
        assert budgets == ([1.0] if name == "full" else [1.0, 0.75, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_stores_the_dtype_that_auto_chose(small, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("buddy.builders.model.fastest_dtype", lambda accelerator: dtype)
    fit(small(tmp_path, "router=uniform", "rivals=[]", "backbone.dtype=auto"), "small")
    assert read_run(tmp_path / "small" / "uniform" / "seed-0").recipe.backbone.dtype == dtype
    comparison = json.loads((tmp_path / "small" / "comparison.json").read_text())
    assert comparison["recipe"]["backbone.dtype"] == dtype


@pytest.mark.slow
def test_the_recipe_in_the_folder_makes_the_run_again(finished, tmp_path):
    recipe = load_recipe(finished / "buddy" / "recipe.yaml", [f"output={tmp_path}", "rivals=[]"])
    fit(recipe, "again")
    assert same(*(load_router(read_run(folder / "buddy").folder) for folder in (tmp_path / "again", finished)))


def test_full_depth_equals_dense_and_every_run_spends_what_it_was_asked(finished):
    comparison = json.loads((finished / "comparison.json").read_text())
    assert [run["router"] for run in comparison["runs"]] == ROUTERS
    for run in comparison["runs"]:
        (found,) = run["domains"].values()
        for result in found["results"]:
            assert set(result["executed"].values()) == {result["layers"]}
            assert result["layers"] < 6 or result["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_a_text_that_is_too_short_is_told_with_what_it_gave(small, tmp_path, capsys):
    fit(small(tmp_path, "router=uniform", "rivals=[]", "bridge=null", "data.calibration_windows=300"), "small")
    found = json.loads((tmp_path / "small" / "comparison.json").read_text())["calibration_windows"]
    assert 0 < found < 300
    assert f"{found} of the 300 calibration" in capsys.readouterr().err
    assert f"same {found} calibration" in (tmp_path / "small" / "results.md").read_text()


@pytest.mark.slow
def test_without_steps_a_router_stays_as_calibrated(small, tmp_path):
    fit(small(tmp_path, "trainer.max_steps=0", "rivals=[]"), "small")
    router = load_router(tmp_path / "small" / "buddy" / "seed-0")
    assert not router["output.weight"].any()
    assert router["prior"].any()


@pytest.mark.slow
def test_a_checkpoint_is_for_the_recipes_own_router(small, finished, tmp_path):
    checkpoint = Path(shutil.copy(finished / "buddy" / "checkpoints" / "last.ckpt", tmp_path))
    recipe = small(tmp_path, f"ckpt_path={checkpoint}", "trainer.max_steps=9", "rivals=[uniform]")
    fit(recipe, "small")
    assert last(tmp_path / "small/buddy/seed-0")["global_step"] == 9
    assert read_run(tmp_path / "small" / "uniform" / "seed-0").recipe.ckpt_path is None
    first = load_router(tmp_path / "small/buddy/seed-0")
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"] = {name: value * 0.5 for name, value in content["state_dict"].items()}
    torch.save(content, checkpoint)
    fit(recipe, "small")
    assert not same(load_router(tmp_path / "small/buddy/seed-0"), first), "it starts from what the file holds now"


# Wrong

EARLY = "callbacks=[{{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {{monitor: {}}}}}]"


@pytest.mark.parametrize("way", ["score", "calibrate", "not finite", "few"])
def test_what_a_router_of_ones_own_does_wrong_is_one_sentence(small, tmp_path, way):
    router = f"router={{name: 'tests.comparison.odd_routers:Fails', options: {{way: {way}}}}}"
    with pytest.raises(BuddyError) as caught:
        fit(small(tmp_path, router, "rivals=[]"), "small")
    assert "\n" not in str(caught.value)
    logs = [*tmp_path.rglob("seed-0.log")]
    assert len(logs) == (way in ("score", "calibrate"))
    assert all("odd_routers.py" in log.read_text() for log in logs)


@pytest.mark.parametrize("way", ["attribute", "expanded buffer"])
def test_a_router_whose_state_no_run_can_save_is_refused_before_it_is_measured(small, tmp_path, way):
    router = f"router={{name: 'tests.comparison.odd_routers:Forgets', options: {{way: {way}}}}}"
    with pytest.raises(TrainingError, match=r"Forgets.*buffers"):
        fit(small(tmp_path, router, "rivals=[]"), "small")
    assert not [*tmp_path.rglob("router.safetensors")]


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        (["rivals=[unifrom]"], RegistryError, "unifrom"),
        (["ckpt_path=nowhere.ckpt"], TrainingError, r"nowhere\.ckpt"),
        (["ckpt_path=CHECKPOINT", "router=uniform"], RecipeError, "uniform.*ckpt_path"),
        (["ckpt_path=CHECKPOINT", "adapter.joint=true"], RecipeError, r"adapter\.joint"),
        (["ckpt_path=CHECKPOINT", "trainer.max_steps=0"], TrainingError, r"trainer\.max_steps"),
        (["ckpt_path=CHECKPOINT", "trainer.max_steps=1"], TrainingError, r"trainer\.max_steps"),
        (
            ["adapter.joint=true", "adapter.steps=2", "trainer.max_steps=0", "routing.mean_over=4"],
            RecipeError,
            r"objective\.estimator",
        ),
        (["objective.estimator=weighted"], RegistryError, "weighted"),
        (["budgets=[1.0]"], RecipeError, "budgets"),
        (["callbacks=[{class_path: no.Such}]"], RecipeError, r"no\.Such"),
        (["callbacks=[{class_path: pathlib.PurePath}]"], RecipeError, "Callback"),
        *(([EARLY.format(name)], RecipeError, name) for name in ("val/kll", "val/kl/0.3", "val/perplexity")),
        (["callbacks=[{class_path: lightning.pytorch.callbacks.BatchSizeFinder}]"], RecipeError, r"data\.batch_size"),
        (["trainer.limit_val_batches=0.001"], RecipeError, "limit_val_batches=0.001"),
        (["trainer.overfit_batches=0.001"], RecipeError, "overfit_batches=0.001"),
        (["trainer.accelerator=tpu"], TrainingError, "accelerator"),
        (["trainer.strategy=ddp_spawn"], TrainingError, "strategy"),
        (["fixed=s0123456789abcde"], RecipeError, "fixed"),
        (["trainer.devices=2", "trainer.num_nodes=3"], DataError, "6 devices"),
        (["trainer.devices=100000", "data.batch_size=100000"], TrainingError, "cores"),
        (["predictor.name=regress", "budgets=[0.5]"], BudgetError, "more budgets"),
        (["predictor={name: regress, cap: 0.55}"], BudgetError, r"predictor\.cap"),
        (["predictor.name=regress", "router=full"], BudgetError, "full"),
        (["logger={class_path: pathlib.PurePath}"], RecipeError, "Logger"),
        (["logger={class_path: logging.Logger}"], RecipeError, r"logging\.Logger"),
        (["router.options.hiden=3"], RegistryError, r"router\.options\.hiden"),
        (["data.train_sources=[TEXT]"], RecipeError, r"data\.train_sources"),
        (["data.calibration_sources=[TEXT]"], RecipeError, r"data\.calibration_sources"),
        (["adapter.targets=[q_porj]"], TrainingError, "q_porj"),
        (["bridge.rank=65"], RecipeError, r"bridge\.rank"),
        (["bridge.joint=true", "objective.estimator=perturbed"], RecipeError, "surrogate"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(small, finished, tmp_path, settings, error, named):
    checkpoint = finished / "buddy" / "checkpoints" / "last.ckpt"
    again = f"{small.text.parent}/../{small.text.parent.name}/{small.text.name}"
    settings = [text.replace("CHECKPOINT", str(checkpoint)).replace("TEXT", again) for text in settings]
    with pytest.raises(error, match=named) as caught:
        fit(small(tmp_path / "runs", *settings), "small")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


# Stopped

LONG = ["trainer.max_steps=60", "checkpoint_every=5"]


def begin(small, output: Path, work: str = "seed-0") -> Forked:
    """`buddy fit` in a process of its own, given back when it has saved a checkpoint."""
    process = fork_buddy("fit", "--recipe", str(small.file), f"output={output}", *LONG, folder=output.parent)
    wait_until((output / "small" / "buddy" / work / "checkpoints" / "last.ckpt").exists, process=process)
    return process


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uninterrupted")
    fit(small(output, *LONG), "small")
    return output / "small" / "buddy" / "seed-0"


def assert_same_run(one: Path, two: Path) -> None:
    assert_same_training(one, two)
    metrics = [read_metrics(folder) for folder in (one, two)]
    assert all(each.pop("fit")["seconds"] > 0 for each in metrics)
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_ctrl_c_stops_in_good_order_and_the_same_command_goes_on(small, uninterrupted, tmp_path):
    output = tmp_path / "runs"
    process = begin(small, output)
    with pytest.raises(RunError, match=f"{output}/small/buddy/seed-0"):
        fit(small(output, *LONG), "small")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    stopped = last(output / "small" / "buddy" / "seed-0")["global_step"]
    assert 5 <= stopped < 60
    assert f"Training buddy: {stopped} of 60" in err
    assert "Traceback" not in err
    fit(small(output, *LONG), "small")
    assert names(output / "small") == {"buddy", *BESIDE}
    assert_same_run(uninterrupted, output / "small" / "buddy" / "seed-0")


@pytest.mark.slow
def test_a_kill_leaves_the_published_run_and_a_checkpoint(small, uninterrupted, tmp_path):
    output = tmp_path / "runs"
    fit(small(output, "trainer.max_steps=5"), "small")
    before = contents(output / "small" / "buddy" / "seed-0")
    process = begin(small, output, work=".seed-0.new")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert contents(output / "small" / "buddy" / "seed-0") == before
    assert 5 <= last(output / "small" / "buddy" / ".seed-0.new")["global_step"] < 60
    fit(small(output, *LONG), "small")
    assert_same_run(uninterrupted, output / "small" / "buddy" / "seed-0")
