"""The study as a whole on a tiny run: table, figure, JSON, going on, and what is refused."""

import json

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from buddy.predictor import features
from studies import predictor_study as studying
from studies.predictor_study import main, study
from tests.small import write_text

APP = typer.Typer()
APP.command()(main)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("studies.predictor_choices.POLICIES", 1)
    monkeypatch.setattr("studies.predictor_choices.POLICY", {"steps": 3, "lr": 1e-3})
    monkeypatch.setattr("studies.predictor_choices.RESAMPLES", 50)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("texts")
    one, two = (write_text(folder / f"{name}.jsonl", seed=seed) for seed, name in enumerate(("one", "two"), start=8))
    return f"{one},second={two}"


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_figures")
def test_a_study(predicting, texts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    study(predicting["regress"], texts, windows=8, out=out)
    report = json.loads((out / "predictor.json").read_text())
    assert report["windows"] == 16
    assert [row["layers"] for row in report["fixed"]] == [6, 4, 3]
    assert set(report["fixed"][0]["ways"]) == {"regress", "priced", "hindsight"}
    assert set(report["single"]) == {"grpo", "the run's own"}
    assert all(3 <= point["layers"] <= 6 for points in report["points"].values() for point in points)
    with Image.open(out / "predictor.png") as picture:
        assert picture.size[0] > 1000
    printed = capsys.readouterr().out
    monkeypatch.setattr(features, "_losses", lambda *_: pytest.fail("measured again"))
    study(predicting["regress"], texts, windows=8, out=out)
    assert capsys.readouterr().out == printed


def test_the_run_is_left_as_it_is(predicting, texts, tmp_path):
    folder = predicting["grpo"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    study(folder, texts, windows=8, out=tmp_path / "out", budgets=["0.75", "5layers"])
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report = json.loads((tmp_path / "out" / "predictor.json").read_text())
    assert [row["layers"] for row in report["fixed"]] == [6, 5, 4]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--domains", "/no/such.txt"], "/no/such.txt"),
        (["--domains", " , "], "--domains"),
        (["--domains", "TEXTS", "--budgets", "half"], "half"),
        (["--domains", "TEXTS", "--out", "/no/such/folder/out"], "/no/such/folder"),
        (["--domains", "TEXTS", "--windows", "1"], "documents"),
    ],
)
def test_what_is_refused(predicting, texts, tmp_path, words, named):
    words = [texts if word == "TEXTS" else word for word in words]
    out = [] if "--out" in words else ["--out", str(tmp_path / "out")]
    result = CliRunner().invoke(APP, ["--run", str(predicting["regress"]), *words, *out])
    assert result.exit_code == 2, result.output
    assert named in result.stderr
    assert not (tmp_path / "out" / studying.NUMBERS).exists()
