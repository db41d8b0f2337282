"""`compare` as a whole: what it leaves, what it reuses, what it refuses, and what is left when it is stopped."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import buddy.compare as compare_module
import buddy.fit as fit_module
from buddy.cli.fitting import parse_routers
from buddy.compare import CompareConfig, compare, fit
from buddy.config import load_recipe
from buddy.errors import BuddyError, RecipeError, RegistryError, RunError
from buddy.evaluation.results import Results
from buddy.fit import Session
from buddy.io import load_tensors, read_json
from buddy.run import read_run
from buddy.schema import Recipe
from tests.small import contents, fork_buddy, wait_until, write_text
from tests.training.stopping import last, same

pytestmark = pytest.mark.slow

ROUTERS = "buddy,buddy[hidden=8],shortgpt,random,full"
LABELS = ROUTERS.split(",")
SEEDED = [*LABELS[:2], "random"]
STEPS = "trainer.max_steps=3"


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("texts") / "other.jsonl", 40, seed=5)


@pytest.fixture(scope="module")
def ask(small, other):
    """Makes a `CompareConfig` for a folder."""

    def ask(out: Path, *overrides: str, **options) -> CompareConfig:
        overrides = (STEPS, *overrides)
        options = {"routers": ROUTERS, "seeds": 2, "texts": str(other), "speed": False} | options
        recipe = load_recipe(small.file, overrides)
        routers = options.pop("routers")
        routers = None if routers is None else parse_routers(routers, recipe)
        return CompareConfig(recipe, "small", "buddy compare", routers, out=out, **options)

    return ask


@pytest.fixture(scope="module")
def whole(ask, tmp_path_factory) -> Path:
    """A comparison with everything; read it, never write into it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:  # few tokens are timed, in one round
        patch.setattr("buddy.metrics.timing.STEPS", 4)
        patch.setattr("buddy.evaluation.bench.ROUNDS", 1)
        assert compare(ask(out, speed=True, markdown=out.parent / "copy.md")) == 0
    return out


@pytest.fixture(scope="module")
def comparison(whole) -> Results:
    return Results(read_json(whole / "comparison.json"))


def router_files(out: Path) -> dict[str, Path]:
    found = {path.parent: path for path in out.glob("[!.]*/[!.]*/router.safetensors")}
    return {f"{folder.parent.name}/{folder.name}": path for folder, path in found.items()}


def assert_same_routers(one: Path, other: Path, names: Iterable[str]) -> None:
    for name in names:
        assert same(*(load_tensors(router_files(out)[name]) for out in (one, other))), name


def stamps(folder: Path, router: str = "*") -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"{router}/seed-*/**/*.json")}


# Whole


def test_routers_that_depend_on_a_seed_have_all_seeds_and_the_others_one(whole, comparison):
    counts = comparison.fits.groupby("router", sort=False).size()
    assert [*counts.items()] == [(label, 2 if label in SEEDED else 1) for label in LABELS]
    assert len(router_files(whole)) == 8


def test_only_seed_and_router_differ_between_runs(whole):
    recipes = {name: read_run(path.parent).recipe for name, path in router_files(whole).items()}
    assert {name: recipe.seed for name, recipe in recipes.items()} == {name: int(name[-1]) for name in recipes}
    assert {recipe.data_seed for recipe in recipes.values()} == {0}
    assert len({json.dumps(vars(recipe.data)) for recipe in recipes.values()}) == 1
    (windows,) = {read_json(path.parent / "metrics.json")["windows"] for path in router_files(whole).values()}
    assert windows


def test_seeds_draw_weights_and_orders_and_nothing_of_the_text(whole, comparison):
    first, second = (load_tensors(router_files(whole)[f"buddy/seed-{n}"]) for n in (0, 1))
    assert (first["input.weight"] - second["input.weight"]).abs().max() > 0.01
    assert torch.equal(first["prior"], second["prior"]), "calibrated on the same windows"
    orders = [load_tensors(router_files(whole)[f"random/seed-{n}"])["order"] for n in (0, 1)]
    assert not torch.equal(*orders)
    full = comparison.frame.query("metric == 'loss' and budget == 1.0")
    assert full.groupby(["text", "document"]).value.nunique().eq(1).all()


def test_the_results_name_no_path(whole, other):
    text = (whole / "results.md").read_text()
    assert text.replace("quality", "copy-quality") == (whole.parent / "copy.md").read_text()
    assert (whole.parent / "copy-quality-layers.png").exists()
    assert str(other.parent) not in text + (whole / "comparison.json").read_text()


def test_the_record_and_the_runs_agree(whole, comparison, other):
    from buddy.evaluation.evaluate import evaluate_run

    for run in comparison.record["runs"]:
        folder = next(r["folder"] for r in comparison.record["routers"] if r["label"] == run["router"])
        metrics = read_json(whole / folder / f"seed-{run['seed']}" / "metrics.json")
        assert metrics["results"] == run["domains"]["text"]["results"]
        assert metrics["fit"] == run["fit"]
        assert metrics["fit"]["seconds"] > 0
        assert (metrics["fit"]["parameters"] > 0) == run["router"].startswith("buddy")
    stored = read_json(whole / "shortgpt" / "seed-0" / "evaluations" / "other.json")["results"]
    evaluate_run(whole / "shortgpt" / "seed-0", data=str(other), json_file=other.with_name("again.json"))
    for one, two in zip(stored, read_json(other.with_name("again.json"))["results"], strict=True):
        assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-6)
        assert one["executed"]["max"] == one["layers"] == two["layers"]


@pytest.fixture
def again(whole, tmp_path) -> Path:
    """A copy of the whole comparison."""
    return Path(shutil.copytree(whole, tmp_path / "again"))


# Reused, resumed, refused


def test_what_is_complete_is_not_made_again(again, ask, monkeypatch):
    monkeypatch.setattr(Session, "fit", lambda *_: pytest.fail("a complete run was made again"))
    monkeypatch.setattr(Session, "evaluate", lambda *_: pytest.fail("a complete run was evaluated again"))
    before, timed = stamps(again), (again / "speed.json").stat().st_mtime_ns
    assert compare(ask(again, speed=True)) == 0
    assert (again / "speed.json").stat().st_mtime_ns == timed
    assert compare(ask(again, routers="shortgpt,random", seeds=1)) == 0
    assert Results(read_json(again / "comparison.json")).routers.index.tolist() == ["shortgpt", "random"]
    assert stamps(again) == before


@pytest.fixture
def evaluations(monkeypatch) -> Iterator[list[str]]:
    """Every evaluation is noted; the fourth one is interrupted as long as the list holds "stop" first."""
    seen: list[str] = []
    evaluate = Session.evaluate

    def noted(*args):
        seen.append("evaluation")
        if seen[0] == "stop" and len(seen) == 5:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(Session, "evaluate", noted)
    return seen


def test_an_interrupted_comparison_resumes(whole, ask, tmp_path, evaluations):
    options = {"routers": "shortgpt,buddy,full"}
    evaluations.append("stop")
    with pytest.raises(KeyboardInterrupt):
        compare(ask(tmp_path, **options))
    assert not (tmp_path / "comparison.json").exists()
    stored = stamps(tmp_path, "shortgpt")
    assert {path.name for path in stored} >= {"metrics.json", "other.json"}
    evaluations.clear()
    assert compare(ask(tmp_path, **options)) == 0
    assert len(evaluations) == 8 - 3, "3 of 4 runs × 2 texts were there"
    assert stored == stamps(tmp_path, "shortgpt")
    assert_same_routers(whole, tmp_path, ("buddy/seed-0", "buddy/seed-1", "shortgpt/seed-0"))


def test_another_text_by_the_same_name_is_measured_anew(again, ask, evaluations, tmp_path):
    text = write_text(tmp_path / "other.jsonl", 40, seed=6)
    for _ in range(2):
        assert compare(ask(again, texts=str(text), routers="shortgpt")) == 0
        assert len(evaluations) == 1


def test_what_is_complete_is_compared_without_fitting(again, ask, tmp_path, capsys):
    options = {"texts": None, "finished": True, "seeds": None}
    with pytest.raises(RunError, match="--finished"):
        compare(ask(tmp_path / "out", routers="shortgpt,random", **options))
    with pytest.raises(RecipeError, match="--trained"):
        compare(ask(tmp_path / "out", "bridge.steps=2", routers="shortgpt", trained=again, **options))
    assert not (tmp_path / "out").exists()
    before = stamps(again)
    for seeds, expected in ((None, [0, 1]), (1, [0])):
        assert compare(ask(again, routers="random,uniform", **(options | {"seeds": seeds}))) == 0
        assert "uniform" in capsys.readouterr().err
        assert [(run["router"], run["seed"]) for run in read_json(again / "comparison.json")["runs"]] == [
            ("random", seed) for seed in expected
        ]
    assert stamps(again) == before


def test_runs_of_another_recipe_are_refused_with_the_keys(again, ask, monkeypatch):
    options, before = {"routers": "shortgpt,random", "texts": None}, stamps(again)
    with monkeypatch.context() as patch:
        patch.setattr(Session, "prepare", lambda *_: pytest.fail("it read the model"))
        with pytest.raises(RunError, match=r"routing\.sink_tokens"):
            compare(ask(again, "routing.sink_tokens=0", routers="shortgpt", texts=None))
    with pytest.raises(RunError, match=r"shortgpt/seed-0 and 2 more .*data\.prompt: 12 there, 13 here"):
        compare(ask(again, "data.prompt=13", **options))
    with pytest.raises(RunError, match=r"optimizer\.lr"):
        compare(ask(again, "optimizer.lr=0.1", routers="buddy", texts=None))
    assert compare(ask(again, "output=elsewhere", "rivals=[uniform]", **options)) == 0, "these change nothing"
    assert compare(ask(again, "optimizer.lr=0.1", "trainer.max_steps=9", **options)) == 0, "nothing was trained"
    assert stamps(again) == before
    (again / "shortgpt" / "seed-0" / "metrics.json").write_text("{")
    with pytest.raises(RunError, match=r"shortgpt/seed-0.*metrics\.json"):
        compare(ask(again, **options))


def test_a_router_has_overrides_of_its_own(ask, tmp_path):
    options = {"routers": "buddy[hidden=8;optimizer.lr=0.2]", "seeds": 1, "texts": None}
    assert compare(ask(tmp_path, "optimizer.lr=0.1", **options)) == 0
    run = read_run(tmp_path / "buddy_hidden=8,optimizer.lr=0.2" / "seed-0")
    assert (run.recipe.optimizer.lr, run.recipe.router.options["hidden"]) == (0.2, 8)
    before = stamps(tmp_path)
    assert compare(ask(tmp_path, "optimizer.lr=0.3", **options)) == 0
    assert stamps(tmp_path) == before, "reused"


def test_each_router_is_calibrated_with_its_own_bridges_and_routing(ask, tmp_path):
    own = ("buddy[bridge.rank=1]", "buddy[routing.context_layer=2;routing.sink_tokens=0]")
    options, bridged = {"seeds": 1, "texts": None}, ("bridge.rank=8", "trainer.max_steps=0")
    assert compare(ask(tmp_path / "all", *bridged, routers=",".join(("buddy", *own)), **options)) == 0
    for label in own:
        assert compare(ask(tmp_path / "alone", *bridged, routers=label, **options)) == 0
    together, alone = (router_files(tmp_path / name) for name in ("all", "alone"))
    assert len(alone) == 2
    for name, path in alone.items():
        assert same(load_tensors(together[name]), load_tensors(path)), name
        results = [read_json(file.parent / "metrics.json")["results"] for file in (together[name], path)]
        assert results[0] == results[1]


def test_trained_bridges_of_a_fixed_set_depend_on_no_estimator(ask, tmp_path):
    options, bridged = {"routers": "shortgpt", "seeds": 1, "texts": None}, ("bridge.rank=4", "bridge.steps=1")
    assert compare(ask(tmp_path, *bridged, **options)) == 0
    before = stamps(tmp_path)
    assert compare(ask(tmp_path, *bridged, "objective.estimator=surrogate", "objective.sigma=0.3", **options)) == 0
    assert stamps(tmp_path) == before, "reused"
    with pytest.raises(RunError, match=r"objective\.ce"):
        compare(ask(tmp_path, *bridged, "objective.ce=0.5", **options))


def test_a_reused_run_of_another_training_text_leaves_no_trace_of_it(ask, small, tmp_path):
    options = {"seeds": 1, "texts": None}
    one, two = (f"data.train_sources=[{write_text(tmp_path / f'{n}.jsonl', seed=n)}]" for n in (8, 9))
    assert compare(ask(tmp_path / "mixed", one, **options, routers="shortgpt")) == 0
    assert compare(ask(tmp_path / "mixed", two, **options, routers="buddy,shortgpt")) == 0
    assert compare(ask(tmp_path / "new", two, **options, routers="buddy,shortgpt")) == 0
    mixed, new = (read_json(tmp_path / name / "comparison.json")["inputs"] for name in ("mixed", "new"))
    assert mixed == new


def test_a_begun_run_of_another_recipe_is_refused(ask, tmp_path, evaluations):
    evaluations += ["stop", "", "", ""]
    with pytest.raises(KeyboardInterrupt):
        compare(ask(tmp_path, routers="buddy"))
    assert not (tmp_path / "buddy" / "seed-0" / "metrics.json").exists()
    with pytest.raises(RunError, match=r"buddy/seed-0.*optimizer\.lr: 0\.006 there"):
        compare(ask(tmp_path, "optimizer.lr=0.1", routers="buddy"))


def test_a_mistake_names_its_row(ask, tmp_path):
    with pytest.raises(RecipeError, match=r"^buddy\[routing\.mean_over=8\]: "):
        compare(ask(tmp_path, routers="buddy,buddy[routing.mean_over=8]"))


def test_changed_inputs_are_refused_and_changed_code_warns(ask, again, tmp_path, monkeypatch, capsys):
    from tests.tiny import tiny_folder

    options = {"routers": "shortgpt", "texts": None}
    model, text = tiny_folder(tmp_path / "model", seed=1), write_text(tmp_path / "mine.jsonl")
    inputs = [f"backbone.name={model}", f"data.source={text}"]
    assert compare(ask(tmp_path / "out", *inputs, **options)) == 0
    write_text(text, seed=9)
    with pytest.raises(RunError, match=r"shortgpt/seed-0.*text"):
        compare(ask(tmp_path / "out", *inputs, **options))
    write_text(text)
    tiny_folder(model, seed=2)
    with pytest.raises(RunError, match=r"shortgpt/seed-0.*model"):
        compare(ask(tmp_path / "out", *inputs, **options))
    for place in ("buddy.fit.code_digest", "buddy.worker.code_digest"):
        monkeypatch.setattr(place, lambda router: "other")
    capsys.readouterr()
    assert compare(ask(again, **options)) == 0
    assert f"{again}/shortgpt/seed-0" in capsys.readouterr().err
    new = write_text(tmp_path / "new.jsonl", seed=5)
    assert compare(ask(again, **options | {"texts": f"new={new}"})) == 1
    assert "code" in capsys.readouterr().err.partition("Failed: shortgpt")[2]


# Healed with routers of an earlier comparison

HEAL = ("adapter.steps=2", "adapter.rank=2", "adapter.lr=0.02")


def test_reused_routers_are_healed_and_not_fitted_again(ask, whole, tmp_path, capsys):
    options = {"routers": "buddy,shortgpt,full", "seeds": 1, "texts": None}
    assert compare(ask(tmp_path / "reused", *HEAL, **options, trained=whole)) == 0
    err = capsys.readouterr().err
    assert "Training" not in err
    assert str(whole) not in err
    assert compare(ask(tmp_path / "own", *HEAL, **options)) == 0
    assert "Training buddy" in capsys.readouterr().err
    reused, own = ({n: p.parent for n, p in router_files(tmp_path / name).items()} for name in ("reused", "own"))
    assert {*reused} == {*own} == {"buddy/seed-0", "shortgpt/seed-0", "full/seed-0"}
    for name in own:
        ours, theirs = (read_json(runs[name] / "metrics.json")["results"] for runs in (reused, own))
        assert ours == theirs, name
    before = read_json(whole / "buddy/seed-0/metrics.json")["fit"]["seconds"]
    assert read_json(reused["buddy/seed-0"] / "metrics.json")["fit"]["seconds"] > before
    with pytest.raises(RunError, match="healed"):
        compare(ask(tmp_path / "again", "adapter.steps=3", **options, trained=tmp_path / "reused"))


def test_which_routers_are_reused(ask, whole, tmp_path, capsys):
    """One that draws nothing serves every seed, and one that is not trained every training; the rest is fitted."""
    options = {"routers": "shortgpt,random", "seeds": 1, "texts": None, "trained": whole}
    assert compare(ask(tmp_path, *HEAL, "seed=7", "data.seed=0", "optimizer.lr=0.1", **options)) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if str(whole) in line]
    assert "random, seed 7" in line
    assert "shortgpt" not in line
    assert {*router_files(tmp_path)} == {"shortgpt/seed-7", "random/seed-7"}


def test_healing_of_reused_routers_may_train_their_bridges(ask, tmp_path):
    options = {"routers": "shortgpt", "seeds": 1, "texts": None}
    assert compare(ask(tmp_path / "closed", "bridge.rank=4", **options)) == 0
    there = tmp_path / "closed"
    assert compare(ask(tmp_path / "out", *HEAL, "bridge.rank=4", "bridge.steps=3", **options, trained=there)) == 0
    closed, trained = (
        load_tensors(tmp_path / name / "shortgpt/seed-0/bridge.safetensors") for name in ("closed", "out")
    )
    assert not torch.equal(closed["up"], trained["up"])


@pytest.mark.parametrize(
    ("overrides", "trained", "error", "named"),
    [
        ([], "whole", RecipeError, r"adapter\.steps"),
        (["adapter.joint=true"], "whole", RecipeError, r"adapter\.joint"),
        (["bridge.joint=true", "bridge.steps=2"], "whole", RecipeError, r"bridge\.joint"),
        (["adapter.steps=2"], "x" * 300, RunError, "xxx"),
        (["adapter.steps=2"], "out", RunError, "--out"),
        (["adapter.steps=2", "optimizer.lr=0.1"], "whole", RunError, r"optimizer\.lr: 0\.006 there, 0\.1 here"),
        (["adapter.steps=2", "seed=7"], "whole", RunError, "--trained"),
    ],
)
def test_what_cannot_be_reused_is_refused(ask, whole, tmp_path, overrides, trained, error, named):
    (tmp_path / "out").mkdir()
    routers = "buddy,random" if "seed=7" in overrides else ROUTERS
    folder = whole if trained == "whole" else tmp_path / trained
    with pytest.raises(error, match=named):
        compare(ask(tmp_path / "out", *overrides, routers=routers, trained=folder))
    assert not [*(tmp_path / "out").glob("[!.]*")]


# Wrong


@pytest.mark.parametrize(
    ("options", "overrides", "error", "named"),
    [
        ({"routers": "buddy,shortgtp"}, [], RegistryError, "shortgtp"),
        ({"routers": "nowhere_module:Odd,full"}, [], RegistryError, "nowhere_module:Odd"),
        ({"routers": "buddy[hiden=3],full"}, [], RegistryError, r"router\.options\.hiden"),
        ({"seeds": 3}, ["seed=4294967294"], BuddyError, "4294967294"),
        ({}, ["trainer.devices=2"], BuddyError, r"trainer\.devices"),
        ({}, ["ckpt_path=x.ckpt"], BuddyError, "ckpt_path"),
        ({"markdown": Path("nowhere/x.md")}, [], BuddyError, "nowhere"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(ask, tmp_path, options, overrides, error, named):
    with pytest.raises(error, match=named):
        compare(ask(tmp_path / "out", *overrides, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "overrides"), [({"texts": "mine={}"}, []), ({}, ["data.train_sources=[{}]"])])
def test_results_do_not_replace_an_input(ask, tmp_path, options, overrides):
    text = write_text(tmp_path / "mine.jsonl")
    options = {name: value.format(text) for name, value in options.items()}
    with pytest.raises(BuddyError, match="input"):
        compare(ask(tmp_path / "out", *(each.format(text) for each in overrides), markdown=text, **options))


@pytest.mark.parametrize("name", ["random/seed-0/metrics.json", "comparison.json"])
def test_results_do_not_replace_a_file_of_the_comparison(ask, tmp_path, name):
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(BuddyError, match="input"):
        compare(ask(tmp_path / "out", markdown=file))
    assert file.read_text() == "{}"


def test_test_windows_are_read_under_the_fixed_settings_alone(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "_work", lambda *args: [])  # what is refused is refused before any work
    monkeypatch.setattr(compare_module, "collect", lambda done, **kwargs: pytest.fail("evaluated"))

    def refused(*overrides: str, routers: str = "random") -> str:
        with pytest.raises(RecipeError, match=r"data\.evaluate_on=validation") as caught:
            compare(ask(tmp_path / "out", "fixed=s0123456789abcdef", *overrides, routers=routers))
        assert not (tmp_path / "out").exists()
        return re.findall(r"\bs[0-9a-f]{15}\b", str(caught.value))[-1]

    digest = refused()
    assert digest == refused("trainer.accelerator=auto", f"output={tmp_path}", "seed=0", routers="buddy,full")
    assert digest == refused("backbone.accept_license=true")
    assert digest != refused("optimizer.lr=0.5")
    assert digest != refused("router.options.hidden=8")
    stopping = "{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/kl, patience: %d}}"
    assert len({digest, *(refused(f"callbacks=[{stopping % patience}]") for patience in (1, 2))}) == 3
    assert digest != refused("data.test_windows=5")
    assert digest != refused("data.calibration_windows=5")
    with pytest.raises(RecipeError, match="hidden=8"):
        compare(ask(tmp_path / "out", f"fixed={digest}"))
    for overrides in ([f"fixed={digest}"], ["fixed=s0", "optimizer.lr=0.5", "data.evaluate_on=validation"]):
        with pytest.raises(pytest.fail.Exception, match="evaluated"):
            compare(ask(tmp_path / "out", *overrides, routers="random"))


def test_settings_are_chosen_on_validation_windows(ask, tmp_path):
    config = ask(tmp_path / "out", "data.evaluate_on=validation", routers="random", seeds=1)
    assert compare(config) == 0
    found = Results(read_json(config.folder / "comparison.json"))
    assert [each["windows"] for each in found.record["domains"]] == [2, 2]
    assert "the same validation windows" in (config.folder / "results.md").read_text()


def test_a_folder_that_is_something_else_or_in_use_is_refused(ask, whole, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "out").mkdir()
    for folder in (tmp_path / "file", router_files(whole)["full/seed-0"].parent):
        with pytest.raises(RunError, match=str(folder)):
            compare(ask(folder))
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(RunError, match=str(tmp_path / "out")):
        compare(ask(tmp_path / "out", routers="uniform"))
    assert os.listdir(tmp_path / "out") == [".lock"]
    (tmp_path / "out" / "tensorboard").mkdir()
    with pytest.raises(RunError, match="tensorboard"):
        compare(ask(tmp_path / "out", routers="uniform"))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "results.md").write_text("mine")
    with pytest.raises(RunError, match=r"results\.md"):
        fit(Recipe(output=str(tmp_path)), "own")
    assert os.listdir(tmp_path / "own") == ["results.md"]
    for name in ("comparison.json", "comparison.csv", "speed.json", "quality-layers.png"):
        (tmp_path / name / "own").mkdir(parents=True)
        (tmp_path / name / "own" / name).write_text('{"mine": 1}')
        with pytest.raises(RunError, match=name):
            compare(ask(tmp_path / name / "own", routers="uniform"))
        assert contents(tmp_path / name / "own") == {name: b'{"mine": 1}'}
    for call in (lambda out: compare(ask(out)), lambda out: fit(Recipe(output=str(out)), "small")):
        with pytest.raises(RunError, match="shorter"):
            call(tmp_path / ("x" * 300))


def test_finished_seeds_may_lie_far_apart(ask, tmp_path, monkeypatch):
    for seed in (0, 2026):
        assert compare(ask(tmp_path, f"seed={seed}", "data.seed=0", routers="random", seeds=1, texts=None)) == 0
    built, build = [], fit_module.build_router
    monkeypatch.setattr(fit_module, "build_router", lambda *given: built.append(given) or build(*given))
    finished = ask(tmp_path, "seed=0", "data.seed=0", routers="random", seeds=None, texts=None, finished=True)
    assert compare(finished) == 0
    assert [run["seed"] for run in read_json(tmp_path / "comparison.json")["runs"]] == [0, 2026]
    assert len(built) < 20


def test_a_failing_router_stops_no_other(ask, tmp_path, capsys):
    module = "tests.comparison.odd_routers:Fails"
    routers = f"{module},{module}[way=calibrate],uniform"
    assert compare(ask(tmp_path, routers=routers, texts=None)) == 2
    err = capsys.readouterr().err
    (log,) = re.findall(r"ValueError: no score today; .* (\S+)\.\n", err)
    assert "Traceback" in Path(log).read_text()
    record = read_json(tmp_path / "comparison.json")
    assert [run["router"] for run in record["runs"]] == ["uniform"]
    assert [each["router"] for each in record["failures"]] == routers.split(",")[:2]


# Several processes


def test_processes_side_by_side_give_the_same(ask, whole, tmp_path, capsys):
    fails = "tests.comparison.odd_routers:Fails"
    assert compare(ask(tmp_path, routers=f"{fails},shortgpt,buddy", jobs=2)) == 1
    out, err = capsys.readouterr()
    assert f"Failed: {fails}, seed 0: ValueError: no score today" in err
    assert "Training" not in out + err
    assert "Training buddy" in (tmp_path / "buddy" / "seed-1.log").read_text()
    assert_same_routers(whole, tmp_path, ("shortgpt/seed-0", "buddy/seed-0", "buddy/seed-1"))
    one, two = (
        {(run["router"], run["seed"]): (run["domains"], run["fit"]["parameters"]) for run in read_json(path)["runs"]}
        for path in (whole / "comparison.json", tmp_path / "comparison.json")
    )
    assert len(two) == 3
    assert two.items() <= one.items()


def test_ctrl_c_leaves_a_checkpoint(small, tmp_path):
    words = ["compare", "--recipe", str(small.file), "--routers", "buddy", "--seeds", "2", "--out", "out"]
    words += ["--jobs", "2", "trainer.max_steps=9000", "checkpoint_every=5"]
    process = fork_buddy(*words, folder=tmp_path)
    folders = [tmp_path / "out" / "buddy" / f"seed-{seed}" for seed in range(2)]
    wait_until(lambda: all((folder / "checkpoints" / "last.ckpt").exists() for folder in folders), 90, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Stopped." in err
    assert "Traceback" not in err
    for folder in folders:
        assert 5 <= last(folder)["global_step"] < 9000
        assert read_json(folder / "run.json")["seconds"] > 0
