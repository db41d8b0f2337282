"""Bad input through the command and the real modules: one sentence that names the key or value, exit code 2."""

import shutil
from pathlib import Path

import pytest

from buddy.run import read_run
from buddy.run_files import update_checksums
from tests.asking import refused
from tests.small import rewrite
from tests.tiny import tiny_folder


@pytest.fixture
def fit(small, tmp_path):
    """What `buddy fit` says to overrides of the small recipe; it must write nothing."""

    def fit(*overrides: str, recipe: str | Path = small.file) -> str:
        said = refused("fit", "--recipe", recipe, f"output={tmp_path / 'runs'}", *overrides)
        assert not (tmp_path / "runs").exists()
        return said

    return fit


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("router=budy", "'buddy'"),
        ("router=nowhere:Router", "nowhere"),
        ("rivals=[shortgtp]", "'shortgpt'"),
        ("router.options.hiden=3", "'hidden'"),
        ("router.options.prior=none_at_all", "none_at_all"),
        ("budgts=[1.0]", "'budgets'"),
        ("budgets=[0.2]", "2layers"),
        ("routing.context_layer=5", "context_layer"),
        ("routing.mean_over=0", "routing.mean_over"),
        ("routing={mean_over: 8, prompt_plan: shared}", "routing.prompt_plan=token"),
        ("routing.mean_over=8", "objective.estimator=surrogate"),
        ("backbone.name=owner/never-seen", "owner/never-seen"),
        ("backbone.name=/no/such/folder", "/no/such/folder"),
        ("data.source=/no/such.txt", "/no/such.txt"),
        ("data.text_field=body", "data.text_field"),
        ("data.window=513", "data.window"),
        ("trainer.strategy=dpp", "dpp"),
        ("ckpt_path=no.ckpt", "ckpt_path"),
    ],
)
def test_a_recipe_that_cannot_be_fitted(fit, override, named):
    assert named in fit(override)


@pytest.mark.parametrize("text", ["", "Too short."])
def test_text_that_is_empty_or_too_short(fit, tmp_path, text):
    (tmp_path / "mine.txt").write_text(text)
    assert f"{tmp_path}/mine.txt" in fit(f"data.source={tmp_path}/mine.txt")


def test_a_damaged_backbone(fit, small, tmp_path):
    shutil.copytree(small.model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(tmp_path / "model") in fit(f"backbone.name={tmp_path / 'model'}")


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a run to damage."""
    return shutil.copytree(read_run(finished / "buddy").folder, tmp_path / "buddy" / "seed-0")


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--budget", "1.0", "text"]])
def test_a_run_whose_backbone_is_another_or_gone(small, tmp_path, run, command):
    recipe = (run / "recipe.yaml").read_text()
    for folder, named in ((tiny_folder(tmp_path / "model", seed=1), "fingerprint"), ("/no/folder", "/no/folder")):
        (run / "recipe.yaml").write_text(recipe.replace(str(small.model), str(folder)))
        update_checksums(run)
        assert named in refused(*command, "--run", run)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("7layers", ["--budgets", "7layers"]),
        ("/no/such.txt", ["--data", "/no/such.txt"]),
        ("--data", ["--data", ""]),
        ("/no/such/folder", ["--json", "/no/such/folder/curve.json"]),
        ("is a folder", ["--json", "."]),
    ],
)
def test_evaluate_with_what_it_cannot_use(finished, named, words):
    assert named in refused("evaluate", "--run", finished / "buddy", *words)


@pytest.mark.parametrize("command", [["evaluate"], ["evaluate", "--tasks", "piqa"], ["bench"], ["inspect"]])
def test_results_that_would_replace_a_file_of_the_run(run, command):
    before = (run / "metrics.json").read_bytes()
    assert "metrics.json" in refused(*command, "--run", run, "--json", run / "metrics.json")
    assert (run / "metrics.json").read_bytes() == before


def test_an_estimator_that_is_not_here_is_needed_to_fit_alone(run):
    assert read_run(rewrite(run, "estimator: perturbed", "estimator: mine")).recipe.objective.estimator == "mine"
    assert "'mine'" in refused("fit", "--recipe", run / "recipe.yaml")


def test_a_comparison_on_no_task(small):
    assert "--tasks" in refused("compare", "--recipe", small.file, "--tasks", ",")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("0.1", ["--budget", "0.1", "text"]),
        ("prompt", ["--budget", "0.5", ""]),
        ("chat", ["--budget", "0.5", "--chat", "text"]),
    ],
)
def test_generate_with_what_it_cannot_use(finished, named, words):
    assert named in refused("generate", "--run", finished / "buddy", *words)


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "--budget", "75%", "A prompt"),
        ("generate", "--budget", "0.5", "--prompt-budget", "0", "A prompt"),
        ("serve", "--budget", "0ms"),
        ("serve", "--prompt-budget", "auto:2"),
        ("export", "--budget", "half", "--out", "there"),
        ("evaluate", "--budgets", "0.5,1.5"),
        ("bench", "--budgets", "22"),
    ],
)
def test_a_budget_that_no_model_has_is_refused_before_the_run_is_read(words):
    verb, *rest = words
    assert "The budget" in refused(verb, "--run", "/no/such/run", *rest)
