"""Damaged files, full and read-only disks, kills: one sentence, and what was complete stays as it was."""

import os
import signal
import time
from pathlib import Path

import pytest

from buddy.fit import fit
from buddy.io import load_tensors
from tests.recovery.asking import ask, refused
from tests.recovery.files import DAMAGES, FailingDisk, contents, copied, mount, small_disk
from tests.small import only_seeds, start_buddy, write_text

TRAINED = ["rivals=[]", "router.options.prior=none", "trainer.max_steps=6", "checkpoint_every=2"]
# Each verb that reads a run, with its other options; "{new}" is a path where nothing is.
READERS = {
    "evaluate": ["--budgets", "0.5"],
    "generate": ["--budget", "0.5", "text"],
    "bench": ["--rounds", "1"],
    "inspect": ["--text", "some text", "--out", "{new}"],
    "export": ["--budget", "0.5", "--out", "{new}"],
    "push": ["--to", "{new}"],
}
DAMAGED = [
    *(("router.safetensors", kind) for kind in ("missing", "cut", "flipped", "a folder")),
    *(("recipe.yaml", kind) for kind in ("empty", "flipped", "noise")),
    *(("run.json", kind) for kind in ("cut", "another mapping")),
    *(("metrics.json", kind) for kind in ("cut", "flipped")),
    ("inputs.json", "flipped"),
]


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """The complete run of a trained router."""
    output = tmp_path_factory.mktemp("run")
    fit(small(output, *TRAINED), "small")
    return only_seeds(output / "small") / "buddy"


@pytest.fixture
def again(small, tmp_path):
    """`buddy fit` of that run into a folder; the sentence it ends with, None where it went well."""

    def again(output: Path = tmp_path, *overrides: str) -> str | None:
        return ask("fit", "--recipe", small.file, f"output={output}", *TRAINED, *overrides)

    return again


def same_router(one: Path, other: Path) -> None:
    """Fails where the routers of two runs differ."""
    states = [load_tensors(folder / "router.safetensors") for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


# Damaged files


@pytest.mark.parametrize("verb", READERS)
def test_a_damaged_run_is_refused_and_left_alone(run, tmp_path, verb):
    new = tmp_path / "new"
    options = [str(new) if word == "{new}" else word for word in READERS[verb]]
    for name, kind in DAMAGED:
        folder = copied(run, tmp_path / "buddy")
        DAMAGES[kind](folder / name)
        before = contents(folder)
        assert name in refused(verb, "--run", folder, *options), (name, kind)
        assert contents(folder) == before
        assert not new.exists()


def stopped(run: Path, output: Path) -> Path:
    """The run as a kill after its training leaves it, in an output folder."""
    folder = copied(run, output / "small" / "buddy" / "seed-0")
    for name in ("router.safetensors", "metrics.json"):
        (folder / name).unlink()
    recipe = (folder / "recipe.yaml").read_text().splitlines()
    recipe = [f"output: {output}" if line.startswith("output:") else line for line in recipe]
    (folder / "recipe.yaml").write_text("\n".join(recipe) + "\n")
    return folder


@pytest.mark.parametrize("damage", ["empty", "cut", "noise"])
def test_a_damaged_checkpoint_is_refused_and_kept(run, again, tmp_path, damage):
    last = stopped(run, tmp_path) / "checkpoints" / "last.ckpt"
    DAMAGES[damage](last)
    before = last.read_bytes()
    assert str(last) in again()
    assert last.read_bytes() == before
    assert str(last) in again(tmp_path / "other", f"ckpt_path={last}")


def test_a_run_that_was_stopped_after_training_is_completed(run, again, tmp_path):
    folder = stopped(run, tmp_path)
    (folder / "run.json").write_bytes(b"\xff not that")  # not needed to resume
    assert again() is None
    same_router(run, folder)


@pytest.fixture(scope="module")
def made(small, tmp_path_factory) -> tuple[Path, list[str]]:
    """A comparison, and the words to make it again, up to its folder."""
    folder = tmp_path_factory.mktemp("comparison")
    other = write_text(folder / "other.jsonl", 40, seed=5)
    words = ["compare", "--recipe", str(small.file), "--routers", "uniform", "--domains", str(other), "--no-speed"]
    words += ["data.test_windows=2", "data.calibration_windows=1", "--out"]
    assert ask(*words, folder / "out") is None
    return folder / "out", words


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_evaluation_of_a_comparison_is_made_again(made, tmp_path, damage):
    out = copied(made[0], tmp_path / "out")
    (path,) = out.rglob("evaluations/other.json")
    before = path.read_bytes()
    DAMAGES[damage](path)
    assert ask(*made[1], out) is None
    assert path.read_bytes() == before


def test_a_damaged_run_of_a_comparison_is_refused_and_kept(made, tmp_path):
    out = copied(made[0], tmp_path / "out")
    (path,) = out.rglob("metrics.json")
    DAMAGES["flipped"](path)
    before = contents(out)
    said = refused(*made[1], out)
    assert str(path.parent) in said
    assert path.name in said
    assert contents(out) == before


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "another mapping", "a folder"])
def test_a_damaged_comparison_is_refused(made, tmp_path, damage):
    path = tmp_path / "comparison.json"
    path.write_bytes((made[0] / "comparison.json").read_bytes())
    DAMAGES[damage](path)
    assert str(path) in refused("compare", "--from", path)


# Full and read-only disks


def test_a_small_disk(run, again, tmp_path):
    with small_disk(tmp_path / "disk", "20k") as disk:
        assert "No space left on device" in again(disk / "runs")
        assert not list(disk.rglob("metrics.json"))
        assert mount(disk, "remount,size=8m")
        assert again(disk / "runs") is None
        same_router(run, disk / "runs" / "small" / "buddy" / "seed-0")


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_file(small, tmp_path):
    """Every file of a refit in turn finds the disk full; the complete run stays until the new one is complete."""
    words = ["fit", "--recipe", small.file, f"output={tmp_path}", "rivals=[]", "router=uniform", "budgets=[1.0]"]
    assert ask(*words) is None
    final = tmp_path / "small" / "uniform" / "seed-0"
    before = contents(final)
    for number in range(1, 100):
        with FailingDisk(tmp_path / "small", number).active() as disk:
            said = ask(*words, "data.test_windows=5")
        if len(disk.opened) < number:
            break
        failed = disk.opened[number - 1]
        assert said is not None, failed
        assert "No space left on device" in said, failed
        in_final = failed.startswith("uniform/seed-0/")
        assert in_final or contents(final) == before, failed
    assert number > 5
    assert said is None
    assert contents(final) != before


def test_a_disk_that_is_read_only(run, again, tmp_path):
    with small_disk(tmp_path / "disk", "8m") as disk:
        folder = copied(run, disk / "small" / "buddy" / "seed-0")
        before = contents(folder)
        assert mount(disk, "remount,ro")
        assert "Read-only file system" in again(disk, "trainer.max_steps=7")
        assert ask("evaluate", "--run", folder, "--budgets", "0.5") is None
        assert str(disk / "x.json") in refused("evaluate", "--run", folder, "--json", disk / "x.json")
        assert contents(folder) == before


# Kills


@pytest.mark.slow
def test_a_fit_that_is_killed_in_training_resumes_to_the_same_router(small, again, tmp_path):
    steps = ["trainer.max_steps=60", "data.batch_size=8"]
    words = ["fit", "--recipe", str(small.file), f"output={tmp_path}/killed", *TRAINED, *steps]
    process = start_buddy(*words, folder=tmp_path)
    while process.poll() is None and not list((tmp_path / "killed").rglob("last.ckpt")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not list((tmp_path / "killed").rglob("metrics.json"))
    assert again(tmp_path / "killed", *steps) is None
    assert again(tmp_path / "whole", *steps) is None
    same_router(*(tmp_path / name / "small" / "buddy" / "seed-0" for name in ("killed", "whole")))
