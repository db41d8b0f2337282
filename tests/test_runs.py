"""Run folders: whole or not at all, one writer at a time, and plain words for what is wrong with one."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from buddy.config import Recipe, RouterSection, load_recipe, to_yaml
from buddy.errors import RunError
from buddy.router import Geometry
from buddy.run import RunPlace, check_backbone, load_router, read_metrics, read_run, save_router, write_facts

GEOMETRY = Geometry(layers=6, context_layer=1, hidden=16, features=8)


@pytest.fixture
def recipe(tmp_path):
    return Recipe(output=str(tmp_path / "runs"))


@pytest.fixture
def place(recipe):
    return RunPlace.of(recipe, "quick")


def fill(folder, recipe, mark: float = 1.0):
    write_facts(folder, recipe, "quick", backbone="tiny", fingerprint="f00d", geometry=GEOMETRY)
    save_router(folder, {"weight": torch.full((2, 3), mark)})
    (folder / "metrics.json").write_text('{"results": []}')


def made(place, recipe, mark: float = 1.0):
    with place.lock():
        fill(place.open_partial(recipe), recipe, mark)
        return place.publish()


def mark_of(folder) -> float:
    return load_router(folder)["weight"][0, 0].item()


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


# Written and read


def test_a_published_run_reads_back(place, recipe, tmp_path):
    folder = made(place, recipe)
    assert folder == tmp_path / "runs" / "quick" / "buddy"
    run = read_run(folder)
    assert (run.recipe, run.recipe_name, run.router_name) == (recipe, "quick", "buddy")
    assert (run.backbone, run.fingerprint, run.status) == ("tiny", "f00d", "finished")
    assert Geometry(**run.geometry) == GEOMETRY
    assert run.versions.keys() == {"python", "buddy", "torch", "lightning", "transformers"}
    assert json.loads((folder / "run.json").read_text())["seed"] == recipe.seed
    assert read_metrics(folder) == {"results": []}
    assert names(folder.parent) == {"buddy"}


def test_tensors_come_back_as_they_were(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"view": base.T, "again": base, "flags": torch.tensor([True]), "half": base.bfloat16()}
    save_router(tmp_path, state)
    loaded = load_router(tmp_path)
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_the_same_numbers_are_the_same_bytes(tmp_path):
    state = {name: torch.arange(size, dtype=torch.float32) for name, size in (("weight", 6), ("bias", 3))}
    written = set()
    for _ in range(20):
        save_router(tmp_path, state)
        written.add((tmp_path / "router.safetensors").read_bytes())
    assert len(written) == 1


def test_a_router_without_tensors(tmp_path):
    save_router(tmp_path, {})
    assert load_router(tmp_path) == {}


def test_names_become_folders(recipe):
    place = RunPlace.of(replace(recipe, router=RouterSection("my_module:MyRouter")), "a/../b c")
    assert place.final.parts[-2:] == ("a-..-b-c", "my_module-MyRouter")
    assert RunPlace.of(recipe, "..").final.parts[-2:] == ("-", "buddy")


# Going on after an interruption


def test_an_interrupted_run_is_kept_for_the_same_recipe(place, recipe):
    checkpoint = place.partial / "checkpoints" / "last.ckpt"
    with place.lock():
        place.open_partial(recipe)
        checkpoint.parent.mkdir()
        checkpoint.write_text("step 50")
        assert place.open_partial(recipe) == place.partial
        assert checkpoint.exists()
        assert not place.final.exists()


def test_another_recipe_starts_from_an_empty_folder(place, recipe):
    with place.lock():
        (place.open_partial(recipe) / "stale").write_text("")
        place.open_partial(replace(recipe, seed=1))
    assert names(place.partial) == {"recipe.yaml"}
    assert load_recipe(place.partial / "recipe.yaml").seed == 1


@pytest.mark.parametrize("changed", ["model", "text", "router's code"])
def test_other_inputs_start_from_an_empty_folder(place, recipe, changed):
    inputs = {"model": "a", "text": "b", "router's code": "c"}
    with place.lock():
        (place.open_partial(recipe, inputs) / "kept").write_text("")
        place.open_partial(recipe, dict(inputs))
        assert (place.partial / "kept").exists()
        place.open_partial(recipe, inputs | {changed: "other"})
    assert names(place.partial) == {"recipe.yaml", "inputs.json"}


def test_a_damaged_partial_folder_is_emptied(place, recipe):
    with place.lock():
        place.open_partial(recipe)
        (place.partial / "recipe.yaml").write_text("seed: [")
        (place.partial / "stale").write_text("")
        place.open_partial(recipe)
    assert names(place.partial) == {"recipe.yaml"}


def test_a_checkpoint_inside_the_partial_folder_is_never_deleted(place, recipe):
    checkpoint = place.partial / "last.ckpt"
    with place.lock():
        place.open_partial(recipe)
        checkpoint.write_text("step 50")
        place.open_partial(replace(recipe, ckpt_path=str(checkpoint)))
        assert checkpoint.exists()
        place.open_partial(replace(recipe, trainer={**recipe.trainer, "max_steps": 999}, ckpt_path=str(checkpoint)))
        assert checkpoint.exists()


# Killed


def test_a_new_run_takes_the_place_of_the_old(place, recipe):
    made(place, recipe, 1.0)
    assert mark_of(made(place, recipe, 2.0)) == 2.0
    assert names(place.final.parent) == {"buddy"}


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_publishing_leaves_the_old_run_or_the_new(place, recipe, renames):
    """The process is killed after so many of the two renames; whoever comes next finds one whole run."""
    made(place, recipe, 1.0)
    with place.lock():
        fill(place.open_partial(recipe), recipe, 2.0)
    code = f"""
import os, pathlib
from buddy.run import RunPlace
place, rename, left = RunPlace(pathlib.Path({str(place.final)!r})), pathlib.Path.rename, [{renames}]
def limited(self, target):
    if left[0] == 0:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    return rename(self, target)
pathlib.Path.rename = limited
with place.lock():
    place.publish()
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    read_run(place.final)
    assert mark_of(place.final) == (2.0 if renames == 2 else 1.0)
    assert mark_of(made(place, recipe, 3.0)) == 3.0
    assert names(place.final.parent) == {"buddy"}


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    save_router(tmp_path, {"weight": torch.ones(1)})

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match=r"router.safetensors cannot be written \(No space left on device\)"):
        save_router(tmp_path, {"weight": torch.zeros(1)})
    assert load_router(tmp_path) == {"weight": torch.ones(1)}
    assert names(tmp_path) == {"router.safetensors"}


# Two at once


def test_a_second_process_is_refused_with_the_pid_of_the_first(place, recipe):
    code = f"""
import pathlib
from buddy.run import RunPlace
with RunPlace(pathlib.Path({str(place.final)!r})).lock():
    print("held", flush=True)
    input()
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"Process {first.pid} is making .*buddy; wait for it"), place.lock():
            pass
        first.kill()
    with place.lock():  # a killed holder frees it
        place.open_partial(recipe)


def test_the_lock_of_one_router_leaves_others_free(place, recipe):
    other = RunPlace.of(replace(recipe, router=RouterSection("uniform")), "quick")
    with place.lock(), other.lock():
        assert place.open_partial(recipe) != other.open_partial(recipe)


# In the way


def test_a_folder_that_is_no_run_is_never_replaced(place, recipe):
    place.final.mkdir(parents=True)
    (place.final / "thesis.txt").write_text("mine")
    with place.lock(), pytest.raises(RunError, match="in the way and is not a run folder"):
        place.open_partial(recipe)
    assert (place.final / "thesis.txt").read_text() == "mine"


def test_an_output_that_cannot_be_written(tmp_path, recipe):
    (tmp_path / "file").write_text("")
    place = RunPlace.of(replace(recipe, output=str(tmp_path / "file")), "quick")
    with pytest.raises(RunError, match=r"cannot be written .*choose another"), place.lock():
        pass


# Read, and something is wrong


def test_a_missing_folder_gets_the_nearest_name(place, recipe):
    made(place, recipe)
    with pytest.raises(RunError, match=r"no run folder .*budy; did you mean 'buddy'\?"):
        read_run(place.final.with_name("budy"))
    with pytest.raises(RunError, match=r"no run folder .*zzz; make it with `buddy fit --recipe NAME`"):
        read_run(place.final.parent.parent / "zzz" / "zzz")
    with pytest.raises(RunError, match="holds the runs buddy; name one of them"):
        read_run(place.final.parent)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(RunError, match="is not a run folder; name one, such as runs/quickstart/buddy"):
        read_run(tmp_path)


def test_an_unfinished_run(place, recipe):
    with place.lock():
        place.open_partial(recipe)
    with pytest.raises(RunError, match="is unfinished; go on with the same `buddy fit`"):
        read_run(place.final)


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "router.safetensors"])
def test_a_missing_file_is_named(place, recipe, name):
    folder = made(place, recipe)
    (folder / name).unlink()
    with pytest.raises(RunError, match=f"half-written: {name} is missing; make it again"):
        read_run(folder)


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "router.safetensors"])
def test_a_truncated_file_is_named(place, recipe, name):
    folder = made(place, recipe)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) - 20])
    with pytest.raises(RunError, match=f"{name} is damaged .*make the run again"):
        read_run(folder)


@pytest.mark.parametrize("content", ["[]", "", "\x00", '{"results": '])
def test_damaged_metrics(place, recipe, content):
    folder = made(place, recipe)
    (folder / "metrics.json").write_text(content)
    with pytest.raises(RunError, match=r"metrics.json is damaged"):
        read_metrics(folder)
    (folder / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"metrics.json is damaged \(No such file"):
        read_metrics(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "made by a newer Buddy .run format 2.; upgrade"),
        ({"format": None}, r"run.json is damaged .format is missing or wrong"),
        ({"geometry": 3}, r"run.json is damaged .geometry is missing or wrong"),
        ({"fingerprint": None}, r"run.json is damaged .fingerprint is missing or wrong"),
    ],
)
def test_facts_that_cannot_be_used(place, recipe, change, words):
    folder = made(place, recipe)
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, **change}))
    with pytest.raises(RunError, match=words):
        read_run(folder)


def test_a_changed_recipe_is_a_damaged_run(place, recipe):
    folder = made(place, recipe)
    (folder / "recipe.yaml").write_text(to_yaml(replace(recipe, seed=1)))
    with pytest.raises(RunError, match=r"recipe.yaml is damaged \(it is not what was written\)"):
        read_run(folder)


def test_a_recipe_that_this_version_does_not_understand(place, recipe):
    with place.lock():
        fill(place.open_partial(recipe), recipe)
        (place.partial / "recipe.yaml").write_text(to_yaml(recipe) + "sed: 3\n")
        folder = place.publish()
    with pytest.raises(RunError, match=r"recipe.yaml is damaged .*The key 'sed' is unknown"):
        read_run(folder)


def test_nothing_is_published_without_its_router(place, recipe):
    made(place, recipe, 1.0)
    with place.lock():
        fill(place.open_partial(recipe), recipe, 2.0)
        (place.partial / "router.safetensors").unlink()
        with pytest.raises(RunError, match=r"router.safetensors is damaged \(No such file"):
            place.publish()
    assert mark_of(place.final) == 1.0


def test_damaged_tensors(tmp_path):
    (tmp_path / "router.safetensors").write_bytes(b"\xff" * 9)
    with pytest.raises(RunError, match=r"router.safetensors is damaged"):
        load_router(tmp_path)


def test_another_backbone(place, recipe):
    run = read_run(made(place, recipe))
    check_backbone(run, "f00d")
    with pytest.raises(RunError, match=r"another backbone \(tiny, fingerprint f00d, not beef\); load that one"):
        check_backbone(run, "beef")


def test_a_run_may_be_moved(place, recipe, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.move(made(place, recipe), moved)
    assert read_run(moved).recipe == recipe
