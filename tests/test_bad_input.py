"""Every bad input that the issue names, through the command and the real modules: one plain sentence, exit 2."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from buddy.cli import app
from buddy.run import update_checksums
from tests.tiny import tiny_folder


def refused(*words: object, lines: int = 1) -> str:
    """The sentence with which the command ends; `lines` where several mistakes are named at once."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == lines, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.removeprefix("Error: ").strip()


@pytest.fixture
def fit(small, tmp_path):
    """What `buddy fit` says to overrides of the small recipe; it must write nothing."""

    def fit(*overrides: str, recipe: str | Path = small.file, lines: int = 1) -> str:
        said = refused("fit", "--recipe", recipe, f"output={tmp_path / 'runs'}", *overrides, lines=lines)
        assert not (tmp_path / "runs").exists()
        return said

    return fit


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("router=budy", "No router is named 'budy'; did you mean 'buddy'? Installed: "),
        ("router=nowhere:Router", "cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("rivals=[shortgtp]", "No router is named 'shortgtp'; did you mean 'shortgpt'?"),
        ("router.options.hiden=3", "router.options.hiden is unknown; did you mean 'hidden'?"),
        ("router.options.prior=none_at_all", "prior is 'none_at_all'; choose one of greedy, block-influence"),
        ("budgts=[1.0]", "The key 'budgts' is unknown; did you mean 'budgets'?"),
        ("trainer.max_steps=many", "trainer.max_steps must be a whole number, not many"),
        ("data.batch_size=-5", "data.batch_size is -5, but must be at least 1"),
        ("budgets=[]", "budgets is empty"),
        ("budgets=[1.5]", "budgets[0] is 1.5"),
        ("budgets=[0.2]", "below the layers that always run; ask for 2layers (a fraction of 0.333) or more"),
        ("routing.context_layer=5", "routes only with a context_layer from 1 to 4; choose one of those"),
        ("backbone.name=owner/never-seen", "No model 'owner/never-seen' was found (HF_HUB_OFFLINE is set"),
        ("backbone.name=/no/such/folder", "There is no folder '/no/such/folder'; check the path"),
        ("data.source=/no/such.txt", "There is no file or folder /no/such.txt: give a path that exists"),
        ("data.text_field=body", "has no field 'body' but text: set data.text_field"),
        ("trainer.accelerator=gpus", "trainer.accelerator cannot be 'gpus'"),
        ("routing.reroute_every=often", "routing.reroute_every must be a whole number or null, not often"),
        ("data.window=513", "reads at most 512 tokens; set data.window to that or less"),
        ("trainer.strategy=dpp", "strategy=dpp do not work here"),
        ("ckpt_path=no.ckpt", "There is no checkpoint no.ckpt; leave ckpt_path out"),
    ],
)
def test_a_recipe_that_cannot_be_fitted(fit, override, said):
    assert said in fit(override)


def test_all_mistakes_are_named_at_once(fit):
    said = fit("budgets=[]", "sed=1", "optimizer.lr=fast", lines=4)
    assert "has 3 mistakes:" in said
    assert all(part in said for part in ("budgets is empty", "did you mean 'seed'", "optimizer.lr must be a number"))


def test_an_unknown_recipe(fit):
    assert "There is no recipe 'quikstart'" in fit(recipe="quikstart")
    assert "did you mean 'quickstart'?" in fit(recipe="quikstart")


def test_text_that_is_empty_or_too_short(fit, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert f"{tmp_path}/empty.txt is empty; give a file or folder with text in it" in fit(
        f"data.source={tmp_path}/empty.txt"
    )
    (tmp_path / "short.txt").write_text("Too short.")
    said = fit(f"data.source={tmp_path}/short.txt")
    assert "gives 0 windows of 48 tokens in 0 documents and 4 documents are needed" in said
    assert "give more text" in said


def test_a_damaged_backbone(fit, small, tmp_path):
    shutil.copytree(small.model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "cannot be loaded" in fit(f"backbone.name={tmp_path / 'model'}")


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--budget", "1.0", "text"]])
class TestRuns:
    """Run folders that cannot be used, by both commands that read one."""

    def test_missing(self, finished, command):
        said = refused(*command, "--run", finished / "budy")
        assert f"There is no run folder {finished}/budy; did you mean 'buddy'?" in said

    def test_a_folder_of_runs(self, finished, command):
        said = refused(*command, "--run", finished)
        assert "is not a run but holds the runs buddy, full, random, shortgpt, uniform; name one of them" in said

    @pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "router.safetensors"])
    def test_half_written(self, finished, tmp_path, command, name):
        shutil.copytree(finished / "buddy", tmp_path / "buddy")
        (tmp_path / "buddy" / name).unlink()
        assert f"is half-written: {name} is missing; make it again" in refused(*command, "--run", tmp_path / "buddy")

    @pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "router.safetensors"])
    def test_damaged(self, finished, tmp_path, command, name):
        shutil.copytree(finished / "buddy", tmp_path / "buddy")
        path = tmp_path / "buddy" / name
        path.write_bytes(path.read_bytes()[:-9])
        assert f"{name} is damaged" in refused(*command, "--run", tmp_path / "buddy")

    def test_unfinished(self, finished, tmp_path, command):
        shutil.copytree(finished / "buddy", tmp_path / "buddy" / "seed-0")
        (tmp_path / "buddy" / "seed-0" / "metrics.json").unlink()
        said = refused(*command, "--run", tmp_path / "buddy")
        assert "is unfinished" in said

    def test_of_another_backbone(self, finished, small, tmp_path, command):
        model = tiny_folder(tmp_path / "model", seed=1)
        shutil.copytree(finished / "buddy", tmp_path / "buddy")
        recipe = tmp_path / "buddy" / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(small.model), str(model)))
        update_checksums(tmp_path / "buddy")
        assert "was made with another backbone" in refused(*command, "--run", tmp_path / "buddy")

    def test_whose_backbone_is_gone(self, finished, small, tmp_path, command):
        shutil.copytree(finished / "buddy", tmp_path / "buddy")
        recipe = tmp_path / "buddy" / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(small.model), "/no/such/folder"))
        update_checksums(tmp_path / "buddy")
        assert "There is no folder '/no/such/folder'" in refused(*command, "--run", tmp_path / "buddy")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--budgets", "0.5,zero"],
            "The budget 'zero' is neither a fraction such as 0.75 nor a count such as 22layers",
        ),
        (["--budgets", "7layers"], "The budget 7layers is more than the backbone's 6 layers; ask for 6 or fewer"),
        (["--budgets", "0.1"], "below the layers that always run"),
        (["--budgets", ","], "--budgets is empty"),
        (["--data", "/no/such.txt"], "There is no file or folder /no/such.txt"),
        (["--data", ""], "The text to evaluate on has no name; name one, or leave --data out"),
        (["--json", "/no/such/folder/curve.json"], "There is no folder /no/such/folder for curve.json; make it first"),
        (["--json", "."], "is a folder; name a file in it"),
    ],
)
def test_evaluate_with_what_it_cannot_use(finished, words, said):
    assert said in refused("evaluate", "--run", finished / "buddy", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "0.1", "text"], "below the layers that always run"),
        (["--budget", "much", "text"], "The budget 'much' is neither"),
        (["--budget", "0.5", ""], "The prompt is empty"),
        (["--budget", "0.5", "--chat", "text"], "has no chat template"),
    ],
)
def test_generate_with_what_it_cannot_use(finished, words, said):
    assert said in refused("generate", "--run", finished / "buddy", *words)
