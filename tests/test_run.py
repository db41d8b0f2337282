"""Run folders: whole or not at all, one writer at a time, resumed in place, and plain errors for what is wrong."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from buddy.config import load_recipe
from buddy.errors import DamagedError, RunError
from buddy.io import read_json, write_json
from buddy.provenance import PACKAGES, code_digest
from buddy.router import Geometry
from buddy.run import RunFolder, folder_name, read_run
from buddy.run_files import checksums_of, load_router, read_metrics, save_router, seconds_in, timed, update_checksums
from buddy.schema import ClassSpec, OptimizerSection, Recipe
from tests.recovery.damage import DAMAGES
from tests.small import Forked

GEOMETRY = Geometry(layers=6, context_layer=1, hidden=16, features=8)
DIGESTS = {"model": "f00d", "text": "a", "router's code": "c"}
ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return Recipe(output=str(tmp_path / "runs"))


@pytest.fixture
def folder(recipe) -> RunFolder:
    return RunFolder.of(Path(recipe.output) / "quick", "buddy", recipe.seed)


def steps(recipe: Recipe, number: int) -> Recipe:
    """The recipe with so many steps of training."""
    return replace(recipe, trainer={**recipe.trainer, "max_steps": number})


def begin(folder: RunFolder, recipe: Recipe, digests: dict[str, str] = DIGESTS) -> Path:
    return folder.begin(recipe, "quick", digests, GEOMETRY)


def make(folder: RunFolder, recipe: Recipe, mark: float = 1.0, digests: dict[str, str] = DIGESTS) -> Path:
    """A complete run whose router's weights are all `mark`."""
    with folder.lock():
        save_router(begin(folder, recipe, digests), {"weight": torch.full((2, 3), mark)})
        return folder.complete({"results": []})


def leave_checkpoint(folder: RunFolder, recipe: Recipe) -> Path:
    """An incomplete run with a checkpoint."""
    with folder.lock():
        path = begin(folder, recipe) / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    path.write_text("step 50")
    return path


def mark_of(path: Path) -> float:
    return load_router(path)["weight"][0, 0].item()


def names(path: Path) -> set[str]:
    return {each.name for each in path.iterdir() if each.suffix != ".lock"}


# Written and read


def test_a_complete_run_reads_back(folder, recipe, tmp_path):
    path = make(folder, recipe)
    assert path == tmp_path / "runs" / "quick" / "buddy" / "seed-0"
    assert folder.is_complete
    run = read_run(path)
    assert (run.folder, run.recipe, run.recipe_name, run.router_name) == (path, recipe, "quick", "buddy")
    assert (run.backbone, run.fingerprint) == (recipe.backbone.name, "f00d")
    assert Geometry(**run.geometry) == GEOMETRY
    assert run.versions.keys() == {"python", "buddy", *PACKAGES}
    assert read_metrics(path) == {"results": []}
    assert checksums_of(path).keys() == {"recipe.yaml", "run.json", "inputs.json", "router.safetensors"}
    assert names(path.parent) == {"seed-0"}
    moved = shutil.move(path, tmp_path / "elsewhere")
    assert read_run(moved).recipe == recipe


def test_names_become_folders():
    assert RunFolder.of(Path("runs"), "my_module:MyRouter", 7).path.parts == ("runs", "my_module-MyRouter", "seed-7")
    assert folder_name("a/../b c") == "a-..-b-c"
    assert folder_name("..") == "-"


def test_a_router_folder_stands_for_its_only_seed(folder, recipe):
    path = make(folder, recipe)
    assert read_run(path.parent).folder == path
    make(RunFolder(folder.path.with_name("seed-3")), replace(recipe, seed=3))
    with pytest.raises(RunError, match="seed-0, seed-3"):
        read_run(path.parent)


@pytest.mark.parametrize(
    "run", sorted((ROOT / "docs" / "comparison").glob("**/seed-0")), ids=lambda path: path.parent.name
)
def test_runs_of_version_0_1_read_as_they_are(run, tmp_path):
    found = read_run(run)
    assert (found.backbone, found.router_name) == ("smollm2-135m", run.parent.name.partition("_")[0].partition("=")[0])
    copy = shutil.copytree(run, tmp_path / "run")
    content = (copy / "router.safetensors").read_bytes()
    (copy / "router.safetensors").write_bytes(content[:-1] + b"x")
    with pytest.raises(DamagedError):
        read_run(copy)
    (copy / "router.safetensors").write_bytes(content)
    before = read_metrics(copy)
    update_checksums(copy)
    assert read_run(copy).recipe == found.recipe
    assert read_metrics(copy) == before


# Resumed, and begun anew


CHANGES = {  # of the request: its recipe, its digests, whether the run begun before resumes
    "nothing that matters": (lambda recipe, _: replace(recipe, checkpoint_every=7, output="elsewhere"), {}, True),
    "ckpt_path": (lambda recipe, checkpoint: replace(steps(recipe, 7), ckpt_path=str(checkpoint)), {}, True),
    "recipe": (lambda recipe, _: steps(recipe, 7), {}, False),
    "router's code": (lambda recipe, _: recipe, {"router's code": "other"}, True),
    **{name: (lambda recipe, _: recipe, {name: "other"}, False) for name in ("model", "text", "training text")},
}


@pytest.mark.parametrize("what", CHANGES)
def test_an_interrupted_run_resumes_or_starts_from_an_empty_folder(folder, recipe, capsys, what):
    change, digests, resumes = CHANGES[what]
    checkpoint = leave_checkpoint(folder, recipe)
    requested = change(recipe, checkpoint)
    with folder.lock():
        assert begin(folder, requested, DIGESTS | digests) == folder.path
    assert checkpoint.exists() is resumes
    assert names(folder.path.parent) == {"seed-0"}
    assert load_recipe(folder.path / "recipe.yaml") == requested
    assert ("Warning" in capsys.readouterr().err) is (what == "router's code")


def test_differences_name_keys_inputs_and_damaged_files(folder, recipe):
    assert folder.differences(recipe, DIGESTS) == []
    path = make(folder, recipe)
    other = replace(recipe, optimizer=OptimizerSection(lr=0.5), checkpoint_every=7, output="elsewhere")
    (key, text) = folder.differences(other, DIGESTS | {"text": "b"})
    assert key.startswith("optimizer.lr: ")
    assert "text" in text
    assert folder.differences(other, DIGESTS, ignore=("optimizer.",)) == []
    DAMAGES["flipped"](path / "router.safetensors")
    (reason,) = folder.differences(recipe, DIGESTS)
    assert "router.safetensors" in reason


def test_long_values_that_differ_at_their_end_differ(folder, recipe):
    texts = [f"text-{number}.jsonl" for number in range(20)]
    one, other = (replace(recipe, data=replace(recipe.data, train_sources=[*texts, last])) for last in "bc")
    make(folder, one)
    assert folder.differences(one, DIGESTS) == []
    (reason,) = folder.differences(other, DIGESTS)
    assert reason.startswith("data.train_sources: ")
    assert len(reason) < 200


def test_another_training_text_counts_unless_its_key_may_differ(folder, recipe):
    make(folder, recipe)
    other = DIGESTS | {"training text": "t"}
    assert folder.differences(recipe, other) == ["another training text"]
    assert folder.differences(recipe, other, ignore=("data.train_sources",)) == []
    assert folder.differences(recipe, {}) == []


def test_digests_that_a_run_lacks_differ_from_nothing(folder, recipe):
    more = DIGESTS | {"tokens": "1", "details": "1"}
    make(folder, recipe)
    assert folder.differences(recipe, more) == []
    make(folder, recipe, digests=more)
    assert folder.differences(recipe, DIGESTS) == []
    assert len(folder.differences(recipe, more | {"tokens": "2", "details": "2"})) == 2
    assert len(folder.differences(recipe, more | {"tokens": "2"}, ignore=("data.train_sources",))) == 0


def test_a_run_that_went_on_from_a_checkpoint_is_not_one_from_the_start(folder, recipe):
    make(folder, replace(recipe, ckpt_path="other.ckpt"))
    (reason,) = folder.differences(recipe, DIGESTS)
    assert reason.startswith("ckpt_path: ")


def test_changed_code_is_told_at_each_resumption(folder, recipe, capsys):
    leave_checkpoint(folder, recipe)
    for _ in range(2):
        with folder.lock():
            begin(folder, recipe, DIGESTS | {"router's code": "other"})
        assert "Warning" in capsys.readouterr().err


def test_arguments_of_callbacks_count(folder, recipe):
    make(folder, replace(recipe, callbacks=[ClassSpec("a.B", {"patience": 3})]))
    other = replace(recipe, callbacks=[ClassSpec("a.B", {"patience": 10})])
    (reason,) = folder.differences(other, DIGESTS)
    assert reason.startswith("callbacks: ")


def test_what_may_differ_keeps_a_checkpoint_too(folder, recipe):
    checkpoint = leave_checkpoint(folder, recipe)
    with folder.lock():
        folder.begin(steps(recipe, 7), "small", DIGESTS, GEOMETRY, ignore=("trainer.",))
    assert checkpoint.exists()


def test_training_goes_on_from_a_checkpoint_that_is_asked_for_until_it_has_one_of_its_own(folder, recipe):
    last = leave_checkpoint(folder, recipe)
    asked, fitted = last.with_name("step=2.ckpt"), last.with_name("fitted")
    asked.write_text("step 2")
    fitted.mkdir()
    requested = replace(recipe, ckpt_path=str(asked))
    with folder.lock():
        begin(folder, requested)
        assert asked.exists()
        assert not last.exists()
        assert not fitted.exists()
        last.write_text("step 3")
        begin(folder, requested)
        assert last.exists()
        healing = last.with_name("healing.ckpt")
        healing.write_text("step 4")
        begin(folder, replace(requested, optimizer=OptimizerSection(lr=0.5)))
    assert asked.exists()
    assert not last.exists(), "of another rate"
    assert not healing.exists()


def test_a_run_without_anything_to_resume_from_can_be_abandoned(folder, recipe):
    with folder.lock():
        begin(folder, recipe)
        folder.abandon()
    assert names(folder.path.parent) == set()
    checkpoint = leave_checkpoint(folder, recipe)
    folder.abandon()
    assert checkpoint.exists()
    checkpoint.rename(checkpoint.with_name("fitted"))  # the router and bridges of a run that was to be healed
    folder.abandon()
    assert checkpoint.parent.exists()


# Made again, and killed meanwhile


def test_a_refit_resumes_and_leaves_the_complete_run_until_it_is_complete_itself(folder, recipe):
    path = make(folder, recipe, 1.0)
    stale = leave_checkpoint(folder, steps(recipe, 8))
    assert stale.parent.parent != path
    checkpoint = leave_checkpoint(folder, steps(recipe, 7))
    with folder.lock():
        work = begin(folder, steps(recipe, 7))
        assert checkpoint.exists()
        with pytest.raises(DamagedError):  # there is no router
            folder.complete({"results": []})
        save_router(work, {"weight": torch.full((2, 3), 2.0)})
        assert mark_of(path) == 1.0
        assert read_run(path).recipe == recipe
        folder.complete({"results": [2]})
    assert mark_of(path) == 2.0
    assert read_run(path).recipe == steps(recipe, 7)
    assert names(path.parent) == {"seed-0"}


def completion_killed(folder: RunFolder, step: int) -> int:
    """Complete a run in a fork, killed before so many renames and removals; its exit code."""
    left = [step]

    def counted(work):
        def step(*given, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return work(*given, **options)

        return step

    def complete() -> None:
        os.replace, Path.rename, shutil.rmtree = map(counted, (os.replace, Path.rename, shutil.rmtree))
        with folder.lock():
            folder.complete({"results": []})

    with Forked(complete) as process:
        return process.wait()


@pytest.mark.slow
def test_a_kill_at_any_step_of_completion_leaves_the_old_run_or_the_new(folder, recipe):
    """The process is killed before each rename and each removal in turn; the next lock finds one whole run."""
    other, seen, step = steps(recipe, 7), set(), 0
    while True:
        shutil.rmtree(folder.path.parent, ignore_errors=True)
        make(folder, recipe, 1.0)
        with folder.lock():
            work = begin(folder, other)
            save_router(work, {"weight": torch.full((2, 3), 2.0)})
            for needed in ("checkpoints/fitted/router.safetensors", "predictor-targets/1.json"):
                (work / needed).parent.mkdir(parents=True)
                (work / needed).write_text("of an incomplete run")
        code = completion_killed(folder, step)
        with folder.lock():
            found = read_run(folder.path)
        assert {*found.folder.glob("*/")} == set(), "what only an incomplete run needs is gone"
        assert mark_of(folder.path) == {200: 1.0, 7: 2.0}[found.recipe.trainer["max_steps"]]
        seen.add((code, found.recipe.trainer["max_steps"]))
        assert mark_of(make(folder, recipe, 3.0)) == 3.0
        assert names(folder.path.parent) <= {"seed-0"}
        if code == 0:
            break
        assert code == -signal.SIGKILL
        step += 1
    assert step >= 4
    assert seen == {(-signal.SIGKILL, 200), (-signal.SIGKILL, 7), (0, 7)}


def test_what_a_killed_process_was_deleting_is_not_resumed(folder, recipe, monkeypatch):
    leave_checkpoint(folder, recipe)

    def killed(path: Path, **_: object) -> None:
        if Path(path).exists():
            (Path(path) / "recipe.yaml").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, folder.lock():
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(folder, recipe, DIGESTS | {"text": "other"})
    with folder.lock():
        assert not list(begin(folder, recipe).glob("checkpoints/*"))
    assert names(folder.path.parent) == {"seed-0"}


def test_seconds_add_up_over_the_sessions_of_a_run(folder, recipe):
    with folder.lock():
        with timed(begin(folder, recipe)):
            time.sleep(0.02)
        assert 0.02 <= seconds_in(begin(folder, recipe)) < 5
        (folder.path / "run.json").write_text("{")
        assert seconds_in(begin(folder, recipe)) < 0.02


# Two at once, and things in the way


def test_a_second_process_is_refused(folder, recipe):
    code = "import sys\nfrom pathlib import Path\nfrom buddy.run import RunFolder\n"
    code += "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True)\n    input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    first = subprocess.Popen([sys.executable, "-c", code, folder.path], cwd=ROOT, **pipes)
    with first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=str(folder.path)), folder.lock():
            pass
        with RunFolder(folder.path.with_name("seed-1")).lock():  # another run is free
            pass
        first.kill()
    with folder.lock():  # a killed holder frees it
        begin(folder, recipe)


@pytest.mark.parametrize("way", ["a folder", "a file", "a run of version 0.1"])
def test_something_else_is_never_replaced(folder, recipe, tmp_path, way):
    mine = {"a folder": folder.path / "thesis.txt", "a file": folder.path}.get(way, folder.path.parent / "run.json")
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    with folder.lock(), pytest.raises(RunError, match=str(folder.path.parent)):
        begin(folder, recipe)
    assert mine.read_text() == "{}"


# Read, and something is wrong


def test_a_missing_folder_gets_the_nearest_name(folder, recipe, tmp_path):
    path = make(folder, recipe)
    for asked, named in (
        (path.parent.with_name("budy"), "'buddy'"),
        (path.with_name("seed-1"), "'seed-0'"),
        (path.parent.parent, "buddy"),
        (tmp_path, str(tmp_path)),
        (tmp_path / ("x" * 300), "xxx"),
    ):
        with pytest.raises(RunError, match=named):
            read_run(asked)


def test_an_unfinished_run_is_not_read(folder, recipe):
    leave_checkpoint(folder, recipe)
    for path in (folder.path, folder.path.parent):
        with pytest.raises(RunError, match=r"metrics\.json"):
            read_run(path)


@pytest.mark.parametrize("name", ["recipe.yaml", "run.json", "router.safetensors", "metrics.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "zeros", "another mapping"])
def test_a_damaged_file_is_named(folder, recipe, name, damage):
    path = make(folder, recipe)
    DAMAGES[damage](path / name)
    with pytest.raises(RunError, match=str(path)) as raised:
        read_run(path)
    assert name in str(raised.value) or (name, damage) == ("metrics.json", "missing")


@pytest.mark.parametrize(
    "change",
    [{"format": 3}, {"format": None}, {"geometry": 3}, {"geometry": {}}, {"fingerprint": None}, {"backbone": "a\0b"}],
)
def test_facts_that_cannot_be_used(folder, recipe, change):
    path = make(folder, recipe)
    write_json(path / "run.json", read_json(path / "run.json") | change)
    update_checksums(path)
    with pytest.raises(RunError, match=next(iter(change))):
        read_run(path)


def test_a_recipe_that_cannot_be_used(folder, recipe):
    path = make(folder, recipe)
    (path / "recipe.yaml").write_text("output: ${oc.env:HOME}")
    update_checksums(path)
    with pytest.raises(DamagedError) as raised:
        read_run(path)
    assert raised.value.path == path / "recipe.yaml"


# The digest of a router's code

CODE = '''
"""A module."""
import torch
class Mine:
    def score(self, x):
        # why
        return torch.relu(x) + 1
'''


def test_the_digest_of_code_is_of_what_it_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def digest(name: str, old: str = "", new: str = "") -> str:
        (tmp_path / f"{name}.py").write_text(CODE.replace(old, new) if old else CODE)
        return code_digest(importlib.import_module(name).Mine)

    whole = digest("whole")
    assert digest("comment", "# why", "# another reason") == whole
    assert digest("docstring", '"""A module."""') == whole
    assert digest("layout", "relu(x)", "relu(\n            x,\n        )") == whole
    assert digest("number", "+ 1", "+ 2") != whole
    assert code_digest(type("Made", (), {"__module__": "nowhere"})) == "unknown"
