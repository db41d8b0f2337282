"""Kills, full and read-only disks, two fits at once, damaged files: one sentence, and what was good stays as it was."""

import gc
import os
import signal
from pathlib import Path

import pytest

from buddy.cli.app import app
from buddy.compare import fit
from buddy.io import load_tensors
from buddy.run import RunFolder, read_run
from buddy.schema import Recipe
from tests.asking import ask, refused
from tests.recovery.conftest import TRAINED
from tests.recovery.damage import DAMAGES, copied
from tests.recovery.disks import FailingDisk, mount, small_disk
from tests.small import Forked, contents, write_text
from tests.training.stopping import same

pytestmark = pytest.mark.slow

STATIC = ["rivals=[]", "router=uniform", "budgets=[1.0]"]

# Each verb that reads a run, with what it needs beside; "{new}" is a path where nothing is.
READERS = {
    "evaluate": ["--budgets", "0.5"],
    "generate": ["--budget", "0.5", "text"],
    "bench": ["--rounds", "1"],
    "inspect": ["--text", "some text", "--out", "{new}"],
    "export": ["--budget", "0.5", "--out", "{new}"],
    "push": ["--to", "{new}"],
    "serve": ["--port", "0"],
}


@pytest.fixture
def again(small, tmp_path):
    """`buddy fit` of that run into a folder; its error, or None."""

    def again(output: Path = tmp_path, *overrides: str) -> str | None:
        return ask("fit", "--recipe", small.file, f"output={output}", *TRAINED, *overrides)

    return again


@pytest.fixture
def unfinished(run, small, tmp_path) -> Path:
    """The run as a kill after its training left it, in `tmp_path`; `again` resumes it."""
    folder = copied(run, tmp_path / "small" / "buddy" / "seed-0")
    for name in ("router.safetensors", "metrics.json"):
        (folder / name).unlink()
    return folder


def same_router(one: Path, other: Path) -> None:
    assert same(*(load_tensors(folder / "router.safetensors") for folder in (one, other)))


# Damaged


def test_every_verb_that_reads_a_run_is_here():
    from typer.main import get_command

    commands = get_command(app).commands
    assert {name for name, each in commands.items() if any("--run" in p.opts for p in each.params)} == {*READERS}


@pytest.mark.parametrize("verb", READERS)
def test_a_damaged_run_is_refused_and_left_alone(run, tmp_path, verb):
    new = tmp_path / "new"
    options = [str(new) if word == "{new}" else word for word in READERS[verb]]
    for name, damage in (("router.safetensors", "flipped"), ("metrics.json", "cut"), ("recipe.yaml", "a folder")):
        folder = copied(run, tmp_path / "buddy")
        DAMAGES[damage](folder / name)
        before = contents(folder)
        assert name in refused(verb, "--run", folder, *options)
        assert contents(folder) == before
        assert not new.exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "a list", "empty"])
def test_a_damaged_checkpoint_is_refused(unfinished, again, tmp_path, damage):
    last = unfinished / "checkpoints" / "last.ckpt"
    DAMAGES[damage](last)
    before = last.read_bytes()
    assert str(last) in again()
    assert last.read_bytes() == before
    assert str(last) in again(tmp_path / "other", f"ckpt_path={last}")


def test_files_that_are_not_needed_to_resume_may_be_damaged(run, unfinished, again):
    for name in ("run.json", "inputs.json", "hparams.yaml"):
        (unfinished / name).write_bytes(b"\xff not that")
    assert again() is None
    same_router(run, unfinished)


# Reused and made again


def test_complete_runs_are_reused_and_damaged_ones_made_again(small, run, tmp_path):
    recipe = small(tmp_path, *TRAINED[1:], "rivals=[uniform]")
    fit(recipe, "small")
    folders = {name: tmp_path / "small" / name / "seed-0" for name in ("uniform", "buddy")}
    before = {name: contents(folder) for name, folder in folders.items()}
    fit(recipe, "small")
    for name, folder in folders.items():
        assert contents(folder) == before[name]
    DAMAGES["flipped"](folders["buddy"] / "router.safetensors")
    fit(recipe, "small")
    same_router(run, read_run(folders["buddy"]).folder)
    assert contents(folders["uniform"]) == before["uniform"]


# Killed


def fit_killed(recipe: Recipe, write: int) -> bool:
    """Fit in a fork, killed before the so many-th file that it writes; whether it came that far."""
    replace, left = os.replace, [write]

    def counted(*given: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*given)

    def killed() -> None:
        os.replace = counted
        fit(recipe, "small")

    with Forked(killed) as process:
        return process.wait() == -signal.SIGKILL


@pytest.mark.soak
@pytest.mark.parametrize("refit", [True, False])
def test_a_fit_that_is_killed_at_any_file_resumes(small, run, tmp_path, refit):
    """Each time the next fit ends with the run that an undisturbed one makes; a run to be replaced stays until then."""
    write = 1
    while True:
        output = tmp_path / str(write)
        if refit:
            short = ["router=buddy", "router.options.prior=none", "budgets=[1.0,0.5]", "trainer.max_steps=1"]
            fit(small(output, *STATIC, *short), "small")
        folder = RunFolder(output / "small" / "buddy" / "seed-0")
        killed = fit_killed(small(output, *TRAINED), write)
        assert folder.is_complete or not refit
        if folder.is_complete:
            assert read_run(folder.path).recipe.trainer["max_steps"] in (1, 6)
        fit(small(output, *TRAINED), "small")
        same_router(run, folder.path)
        assert not [path for path in output.rglob(".*") if not path.name.endswith(".lock")]
        if not killed:
            break
        write += 3
    assert write > 6


# Full


@pytest.mark.parametrize("size", ["8k", "300k"])
def test_a_small_disk(run, again, tmp_path, size):
    with small_disk(tmp_path / "disk", size) as disk:
        said = again(disk / "runs")
        folder = disk / "runs" / "small" / "buddy" / "seed-0"
        assert "No space left on device" in said
        assert not (folder / "metrics.json").exists()
        assert not list(disk.rglob("*.part"))
        assert mount(disk, "remount,size=8m")
        assert again(disk / "runs") is None
        same_router(run, folder)


def test_a_disk_that_is_full_at_any_file(small, tmp_path):
    """Every third file of a fit in turn finds the disk full, while there is a complete run to be spoilt."""
    recipe = ["fit", "--recipe", small.file, f"output={tmp_path}", *STATIC]
    assert ask(*recipe) is None
    folder = tmp_path / "small" / "uniform" / "seed-0"
    before, number = contents(folder), 1
    while True:
        with FailingDisk(tmp_path / "small", number).under() as disk:
            said = ask(*recipe, "data.test_windows=5")
        if len(disk.opened) < number:
            break
        failed = disk.opened[number - 1]
        assert "No space left on device" in said, failed
        assert contents(folder) == before or read_run(folder).recipe.data.test_windows == 5, failed
        assert not list(tmp_path.rglob("*.part")), failed
        number += 3
    assert number > 6
    assert said is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that datasets does not close
def test_a_full_cache_of_text(small, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "20k") as disk:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", disk)
        text = write_text(tmp_path / "new.jsonl", seed=77)
        said = refused("fit", "--recipe", small.file, f"output={tmp_path}/runs", f"data.source={text}", *STATIC)
        assert str(text) in said
        assert "No space left on device" in said
        assert not (tmp_path / "runs").exists()
    gc.collect()  # here, and not in another test


# Read-only, and two at once


def test_a_disk_that_is_read_only(run, again, tmp_path):
    with small_disk(tmp_path / "disk", "8m") as disk:
        folder = copied(run, disk / "small" / "buddy" / "seed-0")
        before = contents(folder)
        assert mount(disk, "remount,ro")
        assert "Read-only file system" in again(disk, "trainer.max_steps=7")
        assert ask("evaluate", "--run", folder, "--budgets", "0.5") is None
        assert "read-only" in refused("evaluate", "--run", folder, "--budgets", "0.5", "--json", disk / "x.json")
        assert "Read-only" in refused("inspect", "--run", folder, "--text", "some text", "--budget", "0.5")
        assert contents(folder) == before


# A comparison


def test_a_damaged_evaluation_is_made_again_and_a_damaged_run_refused(small, tmp_path):
    out, other = tmp_path / "out", write_text(tmp_path / "other.jsonl", 40, seed=5)
    compare = ["compare", "--recipe", small.file, "--routers", "uniform", "--domains", other, "--no-speed"]
    compare += ["--out", out, "data.test_windows=2", "data.calibration_windows=1"]
    assert ask(*compare) is None
    (folder,) = out.glob("**/uniform/seed-0")
    evaluation = folder / "evaluations" / "other.json"
    whole = evaluation.read_bytes()
    DAMAGES["flipped"](evaluation)
    assert ask(*compare) is None
    assert evaluation.read_bytes() == whole
    DAMAGES["cut"](folder / "inputs.json")
    before = contents(out)
    assert "inputs.json" in refused(*compare)
    assert contents(out) == before
