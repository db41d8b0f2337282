"""`compare` as a whole: what it leaves, what it reuses, what it refuses, and what is left when it is stopped."""

import csv
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from buddy.cli.fitting import parse_routers
from buddy.compare import CompareConfig, compare
from buddy.config import load_recipe
from buddy.errors import BuddyError, RecipeError, RegistryError, RunError
from buddy.evaluation.results import Results
from buddy.fit import Session
from buddy.io import load_tensors, read_json
from buddy.run import read_run
from buddy.scoring.perplexity import scores_of
from tests.small import start_buddy, write_text

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
        first, second = (load_tensors(router_files(out)[name]) for out in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


def without_times(record: dict) -> dict:
    """What a second comparison has to repeat to the bit."""
    runs = [{**run, "fit": run["fit"]["parameters"]} for run in record["runs"]]
    return {**record, "runs": runs, "created": None, "speed": None}


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*/seed-*/**/*.json")}


# Whole


def test_everything_is_left_behind(whole):
    names = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    figures = {"quality-layers.png", "quality-time.png"}
    routers = {name.partition("/")[0] for name in router_files(whole)}
    assert names == {
        "comparison.json",
        "comparison.csv",
        "results.md",
        *routers,
        "speed.json",
        "tensorboard",
        *figures,
    }
    assert {path.name for path in whole.parent.iterdir()} == {"out", "copy.md", *(f"copy-{name}" for name in figures)}


def test_routers_that_depend_on_a_seed_have_all_seeds_and_the_others_one(whole, comparison):
    assert [*comparison.routers.index] == LABELS
    assert {label: len(comparison.fits.loc[label]) for label in LABELS} == {
        label: 2 if label in SEEDED else 1 for label in LABELS
    }
    assert len(router_files(whole)) == 8


def test_a_fixed_seed_is_not_repeated(ask, tmp_path):
    assert compare(ask(tmp_path, routers="random[seed=4],random", texts=None)) == 0
    assert [path.parent.name for path in tmp_path.glob("*/[!.]*/run.json")].count("seed-1") == 1


def test_each_run_is_an_ordinary_one_and_only_seed_and_router_differ(whole):
    recipes = {name: read_run(path.parent).recipe for name, path in router_files(whole).items()}
    assert {name: recipe.seed for name, recipe in recipes.items()} == {name: int(name[-1]) for name in recipes}
    assert {recipe.data_seed for recipe in recipes.values()} == {0}
    assert len({json.dumps(vars(recipe.data)) for recipe in recipes.values()}) == 1
    windows = {read_json(path.parent / "metrics.json")["windows"] for path in router_files(whole).values()}
    assert len(windows) == 1
    assert None not in windows


def test_seeds_draw_weights_and_orders_and_nothing_of_the_text(whole, comparison):
    first, second = (load_tensors(router_files(whole)[f"buddy/seed-{n}"]) for n in (0, 1))
    assert (first["input.weight"] - second["input.weight"]).abs().max() > 0.01
    assert torch.equal(first["prior"], second["prior"]), "calibrated on the same windows"
    orders = [load_tensors(router_files(whole)[f"random/seed-{n}"])["order"] for n in (0, 1)]
    assert not torch.equal(*orders)
    full = comparison.frame.query("metric == 'loss' and budget == 1.0")
    assert full.groupby(["text", "document"]).value.nunique().eq(1).all()


def test_json_csv_and_the_runs_agree(whole, comparison):
    lines = list(csv.DictReader((whole / "comparison.csv").read_text().splitlines()))
    assert len(lines) == sum(2 * (1 if run["router"] == "full" else 3) for run in comparison.record["runs"])
    for run in comparison.record["runs"]:
        folder = next(r["folder"] for r in comparison.record["routers"] if r["label"] == run["router"])
        kept = whole / folder / f"seed-{run['seed']}"
        metrics = read_json(kept / "metrics.json")
        assert metrics["results"] == run["domains"]["text"]["results"]
        assert metrics["fit"] == run["fit"]
        assert metrics["fit"]["seconds"] > 0
        assert (metrics["fit"]["parameters"] > 0) == run["router"].startswith("buddy")
        for entry in read_json(kept / "evaluations" / "other.json")["results"]:
            (line,) = (
                line
                for line in lines
                if (line["router"], line["seed"], line["domain"], line["budget"])
                == (run["router"], str(run["seed"]), "other", str(entry["budget"]))
            )
            assert float(line["perplexity"]) == entry["perplexity"]
            assert int(line["executed_max"]) == int(line["layers"]) == entry["layers"]
            assert float(line["decode_tokens_per_second"]) > 0


def test_a_saved_evaluation_is_what_evaluate_says(whole, small, other):
    from buddy.evaluation.evaluate import evaluate_run

    folder = router_files(whole)["shortgpt/seed-0"].parent
    evaluate_run(folder, data=str(other), json_file=whole.parent / "copy.json")
    again = read_json(whole.parent / "copy.json")
    (whole.parent / "copy.json").unlink()
    for one, two in zip(read_json(folder / "evaluations" / "other.json")["results"], again["results"], strict=True):
        assert one["perplexity"] == pytest.approx(two["perplexity"], rel=1e-6)
        assert one["layers"] == two["layers"]


def test_the_document_names_no_path(whole, other):
    text = (whole / "results.md").read_text()
    assert text.replace("quality", "copy-quality") == (whole.parent / "copy.md").read_text()
    assert str(other.parent) not in text
    assert f"buddy compare --recipe small.yaml --routers '{ROUTERS}' --seeds 2 --domains other.jsonl {STEPS}" in text
    assert (whole / "comparison.json").read_text().count(str(other.parent)) == 0


@pytest.fixture
def again(whole, tmp_path) -> Path:
    """A copy of the whole comparison."""
    return Path(shutil.copytree(whole, tmp_path / "again"))


def test_the_tables_are_on_the_screen(again, ask, capsys):
    assert compare(ask(again, speed=True)) == 0
    out, err = capsys.readouterr()
    titles = ["Perplexity on text", "Difference to the best static router on other", "KL to the dense", "What it takes"]
    for words in (*titles, "Decode, tokens a second", f"TensorBoard: tensorboard --logdir {again}"):
        assert words in out
    assert "Run 3 of 8: buddy[hidden=8], seed 0\n" in err
    assert "Training" not in err
    assert "Evaluating" not in err
    assert "Timing" not in err


def test_the_same_seed_gives_the_same_numbers_to_the_bit(whole, ask, tmp_path):
    assert compare(ask(tmp_path)) == 0
    first, second = (read_json(out / "comparison.json") for out in (whole, tmp_path))
    assert without_times(first) == without_times(second)
    assert_same_routers(whole, tmp_path, router_files(whole))


# Reused, gone on with, refused


def test_what_is_finished_is_not_done_again(again, ask, monkeypatch):
    monkeypatch.setattr(Session, "run", lambda *_: pytest.fail("a finished run was made again"))
    before = stamps(again)
    assert compare(ask(again, routers="shortgpt,random", seeds=1)) == 0
    assert stamps(again) == before
    assert Results(read_json(again / "comparison.json")).routers.index.tolist() == ["shortgpt", "random"]


# Healed with routers of an earlier comparison


HEAL = ("adapter.steps=2", "adapter.rank=2", "adapter.lr=0.02")


def test_lent_routers_are_healed_and_not_fitted_again(ask, whole, tmp_path, capsys):
    options = {"routers": "buddy,shortgpt,random,full", "seeds": 2, "texts": None}
    assert compare(ask(tmp_path / "lent", *HEAL, **options, trained=whole)) == 0
    said = capsys.readouterr().err
    assert "Training" not in said
    assert "fitted here" not in said
    assert compare(ask(tmp_path / "own", *HEAL, **options)) == 0
    assert "Training buddy" in capsys.readouterr().err
    lent, own = ({n: p.parent for n, p in router_files(tmp_path / name).items()} for name in ("lent", "own"))
    healed = {f"{name}/seed-{seed}" for name in ("buddy", "shortgpt", "random") for seed in (0, 1)}
    assert {*lent} == {*own} == {*healed, "full/seed-0"}
    for name in own:
        ours, theirs = (read_json(runs[name] / "metrics.json")["results"] for runs in (lent, own))
        assert ours == theirs, name
    before = read_json(whole / "buddy/seed-0/metrics.json")["fit"]["seconds"]
    assert read_json(lent["buddy/seed-0"] / "metrics.json")["fit"]["seconds"] > before


def test_a_router_that_nobody_lends_is_fitted_and_said(ask, whole, tmp_path, capsys):
    asked = ask(tmp_path, *HEAL, routers="uniform,shortgpt", seeds=1, texts=None, trained=whole)
    assert compare(asked) == 0
    assert "To be fitted here, for want of a finished run: uniform, seed 0." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "lender", "error", "said"),
    [
        ([], "whole", RecipeError, r"lends routers to be healed; give adapter.steps"),
        (["adapter.joint=true"], "whole", RecipeError, r"joint=true trains the routers too; leave --trained out"),
        (["adapter.steps=2"], "nowhere", RunError, r"nowhere is not the folder of a comparison"),
        (["adapter.steps=2"], "x" * 300, RunError, r"x is not the folder of a comparison"),
        (["adapter.steps=2"], "out", RunError, r"holds the unhealed runs, which stay; give another --out"),
        (["adapter.steps=2", "optimizer.lr=0.1"], "whole", RunError, r"recipe .optimizer.lr: 0.006 there, 0.1 here"),
        (["adapter.steps=2", "seed=7"], "whole", RunError, r"a finished run of none of these routers and seeds; leave"),
    ],
)
def test_what_cannot_be_lent_is_refused(ask, whole, tmp_path, overrides, lender, error, said):
    (tmp_path / "out").mkdir()
    routers = "buddy,random" if "seed=7" in overrides else ROUTERS
    asked = ask(
        tmp_path / "out", *overrides, routers=routers, trained=whole if lender == "whole" else tmp_path / lender
    )
    with pytest.raises(error, match=said):
        compare(asked)
    assert not [*(tmp_path / "out").glob("[!.]*")]


def test_a_router_that_was_not_trained_is_lent_whatever_training_would_be(ask, whole, tmp_path, capsys):
    asked = ask(tmp_path, *HEAL, "optimizer.lr=0.1", routers="shortgpt", seeds=1, texts=None, trained=whole)
    assert compare(asked) == 0
    assert "fitted here" not in capsys.readouterr().err


def test_a_router_that_draws_nothing_is_lent_to_every_seed(ask, whole, tmp_path, capsys):
    options = {"routers": "shortgpt,random", "seeds": 1, "texts": None, "trained": whole}
    assert compare(ask(tmp_path, *HEAL, "seed=7", "data.seed=0", **options)) == 0
    assert "To be fitted here, for want of a finished run: random, seed 7." in capsys.readouterr().err
    assert {*router_files(tmp_path)} == {"shortgpt/seed-7", "random/seed-7"}


@pytest.fixture
def lender(whole, tmp_path) -> Path:
    """A comparison of one router, whose files may be changed."""
    shutil.copytree(whole / "shortgpt", tmp_path / "lender" / "shortgpt")
    return tmp_path / "lender"


def test_a_lender_without_results_or_of_other_windows_is_refused_before_work(ask, lender, tmp_path):
    run = lender / "shortgpt" / "seed-0"
    asked = ask(tmp_path / "out", "adapter.steps=2", routers="shortgpt", trained=lender)
    facts, metrics = read_json(run / "run.json"), read_json(run / "metrics.json")
    (run / "run.json").write_text(json.dumps({**facts, "checksums": {}}))
    (run / "metrics.json").write_text(json.dumps({**metrics, "windows": "others"}))
    with pytest.raises(RunError, match=r"was measured on other test windows, so the text in"):
        compare(asked)
    (run / "metrics.json").unlink()
    with pytest.raises(RunError, match=r"metrics.json"):
        compare(asked)
    assert not (tmp_path / "out").exists()


def test_a_lender_that_was_healed_is_refused(ask, whole, tmp_path):
    options = {"routers": "shortgpt", "seeds": 1, "texts": None}
    assert compare(ask(tmp_path / "healed", "adapter.steps=2", **options, trained=whole)) == 0
    with pytest.raises(RunError, match=r"was healed itself; name the comparison that it came from as --trained"):
        compare(ask(tmp_path / "again", "adapter.steps=3", **options, trained=tmp_path / "healed"))


def test_a_router_of_other_code_is_not_lent(ask, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("buddy.training.inputs._code", lambda router: "other")
    asked = ask(tmp_path, "adapter.steps=2", routers="shortgpt", trained=whole)
    with pytest.raises(RunError, match=r"was made with another router's code and cannot lend its router"):
        compare(asked)


@pytest.fixture
def stopping(monkeypatch) -> Iterator[list[str]]:
    """Every evaluation is noted; the fourth one is interrupted as long as the list holds "stop" first."""
    seen: list[str] = []
    for module in ("buddy.compare", "buddy.fit"):
        evaluate = __import__(module, fromlist=["evaluate"]).evaluate

        def noted(*args, evaluate=evaluate, **options):
            seen.append("evaluation")
            if seen[0] == "stop" and len(seen) == 5:
                raise KeyboardInterrupt
            return evaluate(*args, **options)

        monkeypatch.setattr(f"{module}.evaluate", noted)
    return seen


def test_an_interrupted_comparison_goes_on(whole, ask, tmp_path, stopping):
    options = {"routers": "shortgpt,buddy,full"}
    stopping.append("stop")
    with pytest.raises(KeyboardInterrupt):
        compare(ask(tmp_path, **options))
    assert not (tmp_path / "comparison.json").exists()
    kept = stamps(tmp_path)
    assert {path.name for path in kept} >= {"metrics.json", "other.json"}
    stopping.clear()
    assert compare(ask(tmp_path, **options)) == 0
    assert len(stopping) == 8 - 3, "3 of 4 runs × 2 texts were whole"
    assert kept.items() <= stamps(tmp_path).items()
    assert_same_routers(whole, tmp_path, ("buddy/seed-0", "buddy/seed-1", "shortgpt/seed-0"))


def test_a_cut_evaluation_is_made_again(ask, tmp_path, stopping):
    options = {"routers": "shortgpt"}
    compare(ask(tmp_path, **options))
    path = tmp_path / "shortgpt" / "seed-0" / "evaluations" / "other.json"
    scores = scores_of(read_json(path))
    path.write_text(path.read_text()[:100])
    stopping.clear()
    compare(ask(tmp_path, **options))
    assert len(stopping) == 1
    again = scores_of(read_json(path))
    assert [each.loss.tolist() for each in again] == [each.loss.tolist() for each in scores]


def test_another_text_by_the_same_name_is_measured_anew(ask, tmp_path, stopping):
    texts = [write_text(tmp_path / str(number) / "new.jsonl", 40, seed=number) for number in folders(tmp_path, 2)]
    for text in texts:
        compare(ask(tmp_path / "out", routers="shortgpt", texts=str(text)))
    assert len(stopping) == 1 + 2


def folders(place: Path, count: int) -> list[int]:
    for number in range(count):
        (place / str(number)).mkdir()
    return list(range(count))


def test_what_is_finished_is_compared_without_fitting(ask, tmp_path, capsys):
    options = {"texts": None, "finished": True}
    with pytest.raises(RunError, match=r"No run in .*out is finished yet; leave --finished out"):
        compare(ask(tmp_path / "out", routers="shortgpt,random", **options))
    assert not (tmp_path / "out" / "comparison.json").exists()
    compare(ask(tmp_path / "out", routers="random", seeds=1, texts=None))
    before = stamps(tmp_path / "out")
    assert compare(ask(tmp_path / "out", routers="shortgpt,random,uniform", **options)) == 0
    assert stamps(tmp_path / "out") == before
    assert "Not finished, and left out: shortgpt, uniform." in capsys.readouterr().err
    record = read_json(tmp_path / "out" / "comparison.json")
    assert [(run["router"], run["seed"]) for run in record["runs"]] == [("random", 0)]
    assert "--finished" in record["command"]


def test_all_that_is_finished_is_compared_however_many_seeds_that_are(ask, tmp_path):
    options = {"routers": "random,uniform", "texts": None}
    assert compare(ask(tmp_path, seeds=4, **options)) == 0
    for seeds, count in ((None, 4), (2, 2)):
        assert compare(ask(tmp_path, finished=True, **(options | {"seeds": seeds}))) == 0
        runs = [run["seed"] for run in read_json(tmp_path / "comparison.json")["runs"] if run["router"] == "random"]
        assert runs == [*range(count)]


def test_a_damaged_run_is_told_with_what_makes_it_again(ask, tmp_path):
    options = {"routers": "shortgpt", "texts": None}
    compare(ask(tmp_path, **options))
    (router_files(tmp_path)["shortgpt/seed-0"].parent / "metrics.json").write_text("{")
    with pytest.raises(
        RunError, match=r"json is damaged .*\); delete .*/shortgpt/seed-0 and repeat the `buddy compare`"
    ):
        compare(ask(tmp_path, **options))


def test_a_predictor_is_said_to_have_no_part(ask, tmp_path, capsys):
    assert compare(ask(tmp_path, "predictor.name=regress", routers="uniform", texts=None)) == 0
    assert "A comparison fits no budget predictor" in capsys.readouterr().err


def test_runs_of_another_recipe_are_refused_with_the_keys(ask, tmp_path):
    options = {"routers": "shortgpt,random", "texts": None}
    compare(ask(tmp_path, **options))
    before = stamps(tmp_path)
    words = r"runs/shortgpt/seed-0 and 2 more were made with another recipe \(data\.prompt: 12 there, 13 here\) and"
    with pytest.raises(RunError, match=words):
        compare(ask(tmp_path, "data.prompt=13", **options))
    with pytest.raises(RunError, match=r"shortgpt/seed-0 and 2 more .* \(data\.seed: 0 there, 1 here\)"):
        compare(ask(tmp_path, "data.seed=1", **options))
    assert stamps(tmp_path) == before
    assert compare(ask(tmp_path, "output=elsewhere", "rivals=[uniform]", **options)) == 0, "these change nothing"
    assert compare(ask(tmp_path, "optimizer.lr=0.1", "trainer.max_steps=9", **options)) == 0, "nothing was trained"


def test_each_router_has_its_own_rate(ask, tmp_path):
    options = {"routers": "buddy[hidden=8]", "seeds": 1, "texts": None}
    assert compare(ask(tmp_path, "optimizer.lr=0.1", **options)) == 0
    before = stamps(tmp_path)
    assert compare(ask(tmp_path, "optimizer.lr_by_router.buddy=0.1", **options)) == 0, "as Buddy 0.1 spelt it"
    assert stamps(tmp_path) == before, "reused"
    with pytest.raises(RunError, match="optimizer"):
        compare(ask(tmp_path, "optimizer.lr=0.2", **options))
    other = {**options, "routers": "buddy[hidden=8;optimizer.lr=0.2]"}
    assert compare(ask(tmp_path, "optimizer.lr=0.1", **other)) == 0
    run = read_run(tmp_path / "buddy_hidden=8,optimizer.lr=0.2" / "seed-0")
    assert (run.recipe.optimizer.lr, run.recipe.router.options["hidden"]) == (0.2, 8)


def test_a_run_that_was_begun_with_another_recipe_is_refused(ask, tmp_path, stopping):
    stopping += ["stop", "", "", ""]
    with pytest.raises(KeyboardInterrupt):
        compare(ask(tmp_path, routers="buddy"))
    with pytest.raises(
        RunError, match=r"buddy/\.seed-0\.partial was made with another recipe \(optimizer\.lr: 0\.006 there"
    ):
        compare(ask(tmp_path, "optimizer.lr=0.1", routers="buddy"))


def test_runs_of_a_router_whose_code_changed_are_refused(ask, tmp_path, monkeypatch):
    options = {"routers": "uniform", "texts": None}
    compare(ask(tmp_path, **options))
    compare(ask(tmp_path, **options))
    monkeypatch.setattr("buddy.training.inputs._code", lambda router: "other")
    with pytest.raises(RunError, match=r"was made before the router's code changed"):
        compare(ask(tmp_path, **options))


def test_runs_of_another_backbone_or_text_are_refused(ask, small, tmp_path):
    from tests.tiny import tiny_folder

    model, text = tiny_folder(tmp_path / "model", seed=1), write_text(tmp_path / "mine.jsonl")
    places = [f"backbone.name={model}", f"data.source={text}"]
    options = {"routers": "uniform", "texts": None}
    compare(ask(tmp_path / "out", *places, **options))
    write_text(text, seed=9)
    with pytest.raises(RunError, match=r"uniform/seed-0 was made before the text changed"):
        compare(ask(tmp_path / "out", *places, **options))
    write_text(text)
    tiny_folder(model, seed=2)
    with pytest.raises(RunError, match="was made before the model changed"):
        compare(ask(tmp_path / "out", *places, **options))


# Wrong


@pytest.mark.parametrize(
    ("options", "overrides", "error", "message"),
    [
        ({"routers": "buddy,shortgtp"}, [], RegistryError, "No router is named 'shortgtp'; did you mean 'shortgpt'"),
        ({"routers": "nowhere_module:Odd,full"}, [], RegistryError, "'nowhere_module:Odd' cannot be imported"),
        ({"routers": "buddy[hiden=3],full"}, [], RegistryError, r"router\.options\.hiden is unknown"),
        ({"routers": "buddy[hidden=0]"}, [], RegistryError, "hidden is 0; give a width"),
        ({"routers": "buddy[hidden"}, [], RegistryError, "do not match"),
        ({"seeds": 0}, [], BuddyError, "--seeds is 0; give 1 or more"),
        ({"seeds": 3}, ["seed=4294967294"], BuddyError, "too large for 3 seeds"),
        ({"jobs": 0}, [], BuddyError, "--jobs is 0; give 1 or more"),
        ({"texts": "nowhere.txt"}, [], BuddyError, r"There is no file or folder nowhere\.txt"),
        ({}, ["trainer.devices=2"], BuddyError, "one device; set trainer.devices=1"),
        ({}, ["ckpt_path=x.ckpt"], BuddyError, "leave ckpt_path out"),
        ({}, ["budgets=[0.1]"], BuddyError, "below the layers that always run"),
        ({"markdown": Path("nowhere/x.md")}, [], BuddyError, "There is no folder"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(ask, tmp_path, options, overrides, error, message):
    with pytest.raises(error, match=message):
        compare(ask(tmp_path / "out", *overrides, **options))
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_is_told_before_anything_is_written(ask, tmp_path):
    short = write_text(tmp_path / "short.jsonl", 1)
    with pytest.raises(BuddyError, match=r"short\.jsonl gives \d+ windows of 48 tokens, and data\.test_windows asks"):
        compare(ask(tmp_path / "out", texts=str(short), routers="uniform"))
    assert not (tmp_path / "out").exists()


def test_places_that_are_something_else_are_refused(ask, whole, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="is a file; name a folder"):
        compare(ask(tmp_path / "file"))
    with pytest.raises(RunError, match="is a run folder"):
        compare(ask(router_files(whole)["full/seed-0"].parent))


def test_a_failing_router_stops_no_other(ask, tmp_path, capsys):
    module = "tests.comparison.odd_routers:Fails"
    routers = f"{module},{module}[way=calibrate],uniform"
    assert compare(ask(tmp_path, routers=routers, texts=None)) == 2
    err = capsys.readouterr().err
    assert f"Failed: {module}, seed 0: ValueError: no score today; all of it is in {tmp_path}" in err
    assert f"Failed: {module}[way=calibrate], seed 0: RuntimeError: the measure went wrong; all" in err
    assert "second line" not in err
    (report,) = re.findall(r"no score today; all of it is in (.*)\.\n", err)
    assert "ValueError: no score today" in Path(report).read_text()
    record = read_json(tmp_path / "comparison.json")
    assert [run["router"] for run in record["runs"]] == ["uniform"]
    assert [each["router"] for each in record["failures"]] == routers.split(",")[:2]
    assert f"- {module}, seed 0" in (tmp_path / "results.md").read_text()


def test_where_all_fail_there_is_nothing_to_show(ask, tmp_path):
    assert compare(ask(tmp_path, routers="tests.comparison.odd_routers:Fails", texts=None)) == 1
    assert not (tmp_path / "comparison.json").exists()


# Several processes


def test_processes_side_by_side_give_the_same(ask, whole, tmp_path, capsys):
    fails = "tests.comparison.odd_routers:Fails"
    assert compare(ask(tmp_path, routers=f"{fails},shortgpt,buddy", texts=None, jobs=2)) == 1
    out, err = capsys.readouterr()
    assert "Runs, 2 at once: 4 of 4" in err
    assert f"Failed: {fails}, seed 0: ValueError: no score today" in err
    assert "Training" not in out + err
    assert "Training buddy" in (tmp_path / "runs" / "buddy" / "seed-1.log").read_text()
    assert_same_routers(whole, tmp_path, ("shortgpt/seed-0", "buddy/seed-0", "buddy/seed-1"))


def test_ctrl_c_ends_with_how_to_go_on(small, tmp_path):
    words = ["compare", "--recipe", str(small.file), "--routers", "buddy", "--seeds", "1", "--out", "out"]
    process = start_buddy(*words, "trainer.max_steps=9000", "checkpoint_every=5", folder=tmp_path)
    partial, patience = tmp_path / "out" / "buddy" / ".seed-0.partial", time.monotonic() + 100
    while not (partial / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < patience
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    onward = "Repeat the command to resume: finished runs stay, and training resumes from its last checkpoint."
    assert err.endswith(f"\nStopped. {onward}\n")
    assert "Traceback" not in err
    saved = torch.load(partial / "checkpoints" / "last.ckpt", weights_only=True)
    assert 5 <= saved["global_step"] < 9000
    assert read_json(partial / "seconds.json")["seconds"] > 0


def test_a_second_comparison_into_one_folder_waits_its_turn(ask, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="Another process compares into"):
        compare(ask(tmp_path, routers="uniform"))
    assert os.listdir(tmp_path) == [".lock"]
