"""Full and read-only disks, two fits at once, damaged files: one sentence, and what was good stays as it was."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from buddy.backbone import embedded
from buddy.cli.app import app
from buddy.errors import RunError
from buddy.fit import fit
from buddy.io import load_tensors, read_json
from buddy.run import RunPlace, check_backbone, read_run
from tests.recovery.asking import ask, refused
from tests.recovery.damage import DAMAGES, contents, copied
from tests.recovery.disks import FailingDisk, mount, small_disk
from tests.small import write_text

TRAINED = ["rivals=[]", "router.options.prior=none", "trainer.max_steps=6", "checkpoint_every=2"]
READ = ["recipe.yaml", "run.json", "inputs.json", "metrics.json", "router.safetensors"]  # of a run, by its readers
# What may be so: a run that was handed on need not have all files, and run.json, which has the sums of the others, has
# none of its own (see `test_no_bit_of_run_json_does_harm`).
FREE = {"missing": ["inputs.json", "metrics.json"], "flipped": ["run.json"], "cut at the end": ["run.json"]}

# Each verb that reads a run, with what it needs beside; "{new}" is a path where nothing is.
READERS = {
    "evaluate": ["--budgets", "0.5"],
    "generate": ["--budget", "0.5", "text"],
    "bench": ["--rounds", "1"],
    "inspect": ["--text", "some text", "--out", "{new}"],
    "export": ["--budget", "0.5", "--out", "{new}"],
    "push": ["--to", "{new}"],
}


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """A finished run of a trained router."""
    output = tmp_path_factory.mktemp("run")
    fit(small(output, *TRAINED), "small")
    return output / "small" / "buddy"


@pytest.fixture
def again(small, tmp_path):
    """`buddy fit` of that run into a folder; what it says."""

    def again(output: Path = tmp_path, *overrides: str) -> str | None:
        return ask("fit", "--recipe", small.file, f"output={output}", *TRAINED, *overrides)

    return again


# Damaged


def test_every_verb_that_reads_a_run_is_here():
    from typer.main import get_command

    commands = get_command(app).commands
    assert {name for name, each in commands.items() if any("--run" in p.opts for p in each.params)} == {*READERS}


@pytest.mark.parametrize("verb", READERS)
def test_a_damaged_run_is_refused_and_left_alone(run, tmp_path, verb):
    new = tmp_path / "new"
    options = [str(new) if word == "{new}" else word for word in READERS[verb]]
    for name in READ:
        for kind, damage in DAMAGES.items():
            if name in FREE.get(kind, ()):
                continue
            folder = copied(run, tmp_path / "buddy")
            damage(folder / name)
            before = contents(folder)
            said = refused(verb, "--run", folder, *options)
            assert name in said, (name, kind, said)
            assert re.search(r"damaged|half-written|newer|is not a run", said), (name, kind, said)
            assert contents(folder) == before
            assert not new.exists()


def test_the_readers_read_no_other_file(run, tmp_path, monkeypatch):
    folder, seen = copied(run, tmp_path / "buddy"), set()
    sys.addaudithook(lambda event, args: event == "open" and seen.add(str(args[0])))
    for verb in ("evaluate", "generate"):
        assert ask(verb, "--run", folder, *READERS[verb]) is None
    read = {Path(path).name for path in seen if path.startswith(str(folder))}
    assert read == {*READ}


def test_no_bit_of_run_json_does_harm(run, tmp_path):
    """What a flipped bit changes is noticed, or is only ever shown."""
    folder = copied(run, tmp_path / "buddy")
    path, whole = folder / "run.json", (folder / "run.json").read_bytes()
    sound, noticed = read_run(folder), 0
    for at in range(0, len(whole), 17):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = read_run(folder)
            check_backbone(found, sound.fingerprint)
        except RunError:
            noticed += 1
        else:
            assert found.recipe == sound.recipe
    assert noticed > len(whole) / 17 / 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", embedded.RECORD, embedded.STAMP])
def test_a_damaged_converted_model_is_converted_again(tmp_path, monkeypatch, name):
    def write(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9)

    monkeypatch.setenv("BUDDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_write_model", write)
    monkeypatch.setattr(embedded, "_wheel_file", lambda: Path("model.gguf"))
    folder = embedded.smollm2_folder()
    saved, model = copied(folder, tmp_path / "saved"), contents(folder)
    for damage in DAMAGES.values():
        damage(copied(saved, folder) / name)
        assert embedded.smollm2_folder() == folder
        assert embedded.fault(folder) is None
        again = contents(folder)
        assert all(again[each] == model[each] for each in ("config.json", "model.safetensors"))
    assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == [embedded.NAME]


@pytest.mark.parametrize("damage", ["empty", "cut", "cut at the end", "flipped", "zeros", "noise", "pickle"])
def test_a_damaged_checkpoint_is_refused(run, again, tmp_path, damage):
    partial = unfinished(run, tmp_path)
    last = partial / "checkpoints" / "last.ckpt"
    DAMAGES[damage](last)
    before = last.read_bytes()
    words = rf"The checkpoint {last} is damaged or not one of Buddy's \(.+\); delete it and start anew, or name another"
    assert re.match(words, again())
    assert last.read_bytes() == before
    assert re.match(words, again(tmp_path / "other", f"ckpt_path={last}"))


@pytest.mark.parametrize("name", ["recipe.yaml", "inputs.json"])
@pytest.mark.parametrize("damage", ["cut", "noise", "a folder"])
def test_a_checkpoint_that_nobody_knows_the_recipe_of_is_kept(run, again, tmp_path, name, damage):
    partial = unfinished(run, tmp_path)
    DAMAGES[damage](partial / name)
    before = contents(partial)
    said = again()
    assert said.startswith(f"{partial} holds a checkpoint, and what it was made by cannot be read (")
    assert said.endswith("delete that folder to begin anew, or go on from the checkpoint by its name as ckpt_path.")
    assert contents(partial) == before
    if damage == "cut":
        assert again(tmp_path / "other", f"ckpt_path={partial}/checkpoints/last.ckpt") is None


@pytest.mark.parametrize("name", ["run.json", "seconds.json", "hparams.yaml"])
def test_what_is_not_needed_to_go_on_may_be_damaged(run, again, tmp_path, name):
    partial = unfinished(run, tmp_path)
    (partial / name).write_bytes(b"\xff not that")
    assert again() is None
    same_router(run, tmp_path / "small" / "buddy")


def unfinished(run: Path, output: Path) -> Path:
    """The run as a kill after its training left it, in an output folder."""
    partial = copied(run, output / "small" / ".buddy.partial")
    for name in ("router.safetensors", "metrics.json", "loss.png"):
        (partial / name).unlink()
    facts = json.loads((partial / "run.json").read_text())
    del facts["checksums"]
    (partial / "run.json").write_text(json.dumps({**facts, "status": "running"}))
    recipe = partial / "recipe.yaml"
    recipe.write_text(re.sub(r"^output: .*$", f"output: {output}", recipe.read_text(), flags=re.MULTILINE))
    return partial


def same_router(one: Path, other: Path) -> None:
    states = [load_tensors(folder / "router.safetensors") for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


@pytest.fixture(scope="module")
def made(small, tmp_path_factory) -> tuple[Path, list[str]]:
    """A comparison, and the words to make it again, up to its folder."""
    folder = tmp_path_factory.mktemp("comparison")
    other = write_text(folder / "other.jsonl", 40, seed=5)
    words = ["compare", "--recipe", str(small.file), "--routers", "uniform", "--domains", str(other), "--no-speed"]
    words += ["data.test_windows=2", "data.calibration_windows=1", "--out"]
    assert ask(*words, folder / "out") is None
    return folder / "out", words


class TestComparison:
    """`buddy compare` over what it left before."""

    @pytest.mark.parametrize("damage", ["cut", "flipped", "a folder"])
    def test_a_damaged_evaluation_is_made_again_or_named(self, made, tmp_path, damage):
        out = copied(made[0], tmp_path / "out")
        path = out / "runs" / "uniform" / "seed-0" / "evaluations" / "other.json"
        whole = path.read_bytes()
        DAMAGES[damage](path)
        said = ask(*made[1], out) if damage != "a folder" else refused_by_status(made[1], out)
        if damage == "a folder":
            assert f"{path} cannot be written (Is a directory)" in said
        else:
            assert said is None
            assert path.read_bytes() == whole

    @pytest.mark.parametrize(("name", "damage"), [("metrics.json", "flipped"), ("inputs.json", "cut")])
    def test_a_damaged_run_is_refused(self, made, tmp_path, name, damage):
        out = copied(made[0], tmp_path / "out")
        path = out / "runs" / "uniform" / "seed-0" / name
        DAMAGES[damage](path)
        before = contents(out)
        assert refused(*made[1], out).startswith(f"{path} is damaged (it is not what was written)")
        assert contents(out) == before

    @pytest.mark.parametrize("damage", [name for name in DAMAGES if name not in ("flipped", "cut at the end")])
    def test_a_damaged_record_is_refused(self, made, tmp_path, damage):
        path = Path(shutil.copy(made[0] / "comparison.json", tmp_path))
        DAMAGES[damage](path)
        assert str(path) in refused("compare", "--from", path)


def refused_by_status(words: list[str], out: Path) -> str:
    """What a comparison says in which every run failed, which ends it with 1."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [*words, str(out)])
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    return result.stderr


# Full


@pytest.mark.parametrize("size", ["8k", "20k", "300k"])
def test_a_small_disk(small, run, again, tmp_path, size):
    with small_disk(tmp_path / "disk", size) as disk:
        said = again(disk / "runs")
        assert re.search(r"cannot be written \(No space left on device\); free that place or choose another\.$", said)
        assert not (disk / "runs" / "small" / "buddy").exists()
        assert not list(disk.rglob("*.part"))
        assert mount(disk, "remount,size=8m")
        assert again(disk / "runs") is None
        same_router(run, disk / "runs" / "small" / "buddy")


def test_a_disk_that_is_full_at_any_file(small, tmp_path):
    """Every file of a fit in turn finds the disk full, while a finished run is there to be spoilt."""
    recipe = ["fit", "--recipe", small.file, f"output={tmp_path}", "rivals=[]", "router=uniform", "budgets=[1.0]"]
    with FailingDisk(tmp_path / "small", 0).under() as disk:
        assert ask(*recipe) is None
    final = tmp_path / "small" / "uniform"
    before = contents(final)
    assert {path.partition("/")[0] for path in disk.opened} >= {".uniform.partial", "uniform"}
    for number in range(1, 100):
        with FailingDisk(tmp_path / "small", number).under() as disk:
            said = ask(*recipe, "seed=1")
        if len(disk.opened) < number:
            break
        failed = disk.opened[number - 1]
        assert said is not None, failed
        assert "cannot be written (No space left on device)" in said, failed
        assert not failed.startswith(".uniform") or contents(final) == before, failed
        assert not list(tmp_path.rglob("*.part")), failed
    assert number > 10
    assert said is None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a file that datasets does not close
def test_a_full_cache_of_text(small, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", "20k") as disk:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", disk)
        text = write_text(tmp_path / "new.jsonl", seed=77)
        said = refused(
            "fit", "--recipe", small.file, f"output={tmp_path}/runs", f"data.source={text}", "router=uniform"
        )
        assert said.startswith(f"What is made of the text in {text} cannot be kept or found in {disk} (")
        assert "No space left on device" in said
        assert not (tmp_path / "runs").exists()
    gc.collect()  # here, and not in another test


# Read-only


def test_a_disk_that_is_read_only(small, run, again, tmp_path):
    with small_disk(tmp_path / "disk", "8m") as disk:
        folder = copied(run, disk / "small" / "buddy")
        before = contents(folder)
        assert mount(disk, "remount,ro")
        assert again(disk).startswith(f"{folder} cannot be written (Read-only file system); free that place or choose")
        assert ask("evaluate", "--run", folder, "--budgets", "0.5") is None
        said = refused("evaluate", "--run", folder, "--budgets", "0.5", "--json", disk / "x.json")
        assert said == f"{disk}/x.json cannot be written (the folder is read-only); choose another place."
        said = refused("inspect", "--run", folder, "--text", "some text", "--budget", "0.5")
        assert "cannot be written (Read-only file system)" in said
        assert contents(folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="no folder is read-only to root")
def test_a_folder_that_is_read_only(again, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o555)
    assert "cannot be written (Permission denied); free that place or choose" in again(tmp_path / "runs")


# Two at once

HOLDING = """
import pathlib, sys
from buddy.run import RunPlace
from buddy.run import check_backbone, read_run
with RunPlace(pathlib.Path(sys.argv[1])).lock():
    print("held", flush=True)
    input()
"""


def test_a_second_fit_does_nothing_but_name_the_first(small, tmp_path):
    recipe = small(tmp_path, "rivals=[uniform]")
    place = RunPlace.of(recipe, "small")
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDING, place.final], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout.readline() == "held\n"
        said = refused("fit", "--recipe", small.file, f"output={tmp_path}", "rivals=[uniform]")
        assert said == f"Process {first.pid} is making {place.final}; wait for it or stop it first."
        assert not place.partial.exists()
        assert not (place.final.parent / "uniform").exists()
        first.communicate("\n", timeout=60)


# Killed between two things


def test_a_rival_that_is_finished_is_not_fitted_again(small, tmp_path, monkeypatch, capsys):
    recipe = small(tmp_path, *TRAINED, "rivals=[uniform]")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("buddy.fit.train", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, "small")
    stamp = (tmp_path / "small" / "uniform" / "run.json").stat().st_mtime_ns
    capsys.readouterr()
    fit(recipe, "small")
    assert "Router 1 of 2: uniform, finished before\nRouter 2 of 2: buddy\n" in capsys.readouterr().err
    assert (tmp_path / "small" / "uniform" / "run.json").stat().st_mtime_ns == stamp
    runs = read_json(tmp_path / "small" / "comparison.json")["runs"]
    assert [run["router"] for run in runs] == ["buddy", "uniform"]
    fit(recipe, "small")
    assert (tmp_path / "small" / "uniform" / "run.json").stat().st_mtime_ns > stamp, "a new fit is a new fit"


def test_a_whole_run_that_was_not_put_in_its_place_is_put_there(small, tmp_path, monkeypatch, capsys):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunPlace, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(small(tmp_path, *TRAINED), "small")
    capsys.readouterr()
    fit(small(tmp_path, *TRAINED), "small")
    assert "Training" not in capsys.readouterr().err
    assert (tmp_path / "small" / "comparison.json").exists()


def test_a_checkpoint_in_a_run_that_was_being_replaced_is_found(small, run, tmp_path):
    place = RunPlace.of(small(tmp_path), "small")
    shutil.copytree(run, place.aside)
    recipe = small(tmp_path, *TRAINED, "trainer.max_steps=7", f"ckpt_path={place.final}/checkpoints/last.ckpt")
    fit(recipe, "small")
    assert read_json(place.final / "run.json")["status"] == "finished"
    assert not place.aside.exists()


def test_half_of_what_was_discarded_is_not_gone_on_with(small, run, tmp_path):
    """A kill while an unfinished run of other inputs is deleted must leave nothing that looks like one of these."""
    partial = unfinished(run, tmp_path)
    inputs = json.loads((partial / "inputs.json").read_text())
    place, recipe = RunPlace(tmp_path / "small" / "buddy"), small(tmp_path, *TRAINED)
    real = shutil.rmtree

    def killed(path: Path, **_: object) -> None:
        (Path(path) / "inputs.json").unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, place.lock():
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            place.open_partial(recipe, {**inputs, "text": "another"})
    assert shutil.rmtree is real
    with place.lock():
        assert not list(place.open_partial(recipe, inputs).glob("checkpoints/*"))
    assert not place.discarded.exists()
