"""`buddy export` of whole runs: the folder, what is said of it, and what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from buddy.build import build_data, load_model
from buddy.cli import app
from buddy.errors import BudgetError, DataError, RunError
from buddy.hub.export import OnePlan, export_run
from buddy.run import read_run
from buddy.training.module import evaluate
from tests.small import write_text
from tests.tiny import tiny_folder


def calibration_plan(folder, executed: int) -> list[int]:
    """The plan that most tokens of the calibration windows ask for, by hand."""
    run = read_run(folder)
    routed = load_model(run)
    data = build_data(run.recipe, routed.backbone)
    data.setup()
    ids = data.calibration.input_ids
    runs = routed(ids, executed=torch.full((len(ids),), executed), prompt=run.recipe.data.prompt).runs[:, 1:]
    plans, counts = runs.flatten(0, 1).unique(dim=0, return_counts=True)
    return plans[counts.argmax()].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("name", ["shortgpt", "buddy"])
def test_the_checkpoint_is_the_plan_and_says_so(finished, tmp_path, capsys, name):
    out = tmp_path / "out"
    export_run(finished / name, budget="0.75", out=out)
    record = json.loads((out / "buddy_export.json").read_text())
    kept = calibration_plan(finished / name, 4)
    assert record["kept"] == kept
    assert (record["layers"], record["router"], record["budget"]) == (6, name, "0.75")
    assert record["largest_logit_difference"] <= 1e-4
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(out)("budget depth layer router", return_tensors="pt").input_ids
    routed = load_model(read_run(finished / name))
    runs = torch.zeros(1, ids.shape[1], 6, dtype=torch.bool)
    runs[..., kept] = True
    with torch.no_grad(), routed.changed(sink_tokens=0):
        torch.testing.assert_close(routed(ids, runs=runs).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    said, card = capsys.readouterr().out, (out / "README.md").read_text()
    for text in (said, card):
        assert "runs the first token (an attention sink) of each text through all layers" in text
        assert "routed tokens" in text
    assert f'from_pretrained("{out}")' in said
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert 'AutoModelForCausalLM.from_pretrained("out")' in card


def test_its_perplexity_is_that_of_the_plan_without_sinks(finished, tmp_path):
    export_run(finished / "shortgpt", budget="4layers", out=tmp_path / "out", check=False)
    record = json.loads((tmp_path / "out" / "buddy_export.json").read_text())
    assert record["largest_logit_difference"] is None
    run = read_run(finished / "shortgpt")
    routed = load_model(run)
    data = build_data(run.recipe, routed.backbone)
    data.setup()
    (ours,) = evaluate(routed, data.validation, [4 / 6], prompt=run.recipe.data.prompt)
    assert record["perplexity"]["run"] == pytest.approx(ours.perplexity, rel=1e-5)
    routed.router = OnePlan(routed.geometry, record["kept"])
    with routed.changed(sink_tokens=0):
        (theirs,) = evaluate(routed, data.validation, [4 / 6], prompt=run.recipe.data.prompt)
    assert record["perplexity"]["checkpoint"] == pytest.approx(theirs.perplexity, rel=1e-5)
    assert theirs.perplexity != ours.perplexity


def test_full_depth_is_the_backbone_itself(finished, small, tmp_path):
    export_run(finished / "full", budget="1.0", out=tmp_path / "out")
    whole, cut = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (small.model, tmp_path / "out"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert "attention sink" not in (tmp_path / "out" / "README.md").read_text()


def test_another_text_can_choose_the_plan(finished, tmp_path):
    text = write_text(tmp_path / "other.jsonl", documents=8, seed=5)
    export_run(finished / "buddy", budget="0.5", out=tmp_path / "out", data=str(text), check=False)
    assert json.loads((tmp_path / "out" / "buddy_export.json").read_text())["tokens"] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "1.5"}, BudgetError, "not above 0 and at most 1"),
        ({"budget": "1layer"}, BudgetError, "below the layers that always run"),
        ({"budget": "auto"}, BudgetError, "chosen for each request"),
        ({"data": " "}, DataError, "has no name; name one, or leave --data out"),
        ({"data": "/no/such.txt"}, DataError, "There is no file or folder /no/such.txt"),
    ],
)
def test_what_is_refused_leaves_nothing(finished, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        export_run(finished / "buddy", **{"budget": "0.5", "out": tmp_path / "out", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_text_of_one_window_is_too_short(finished, tmp_path):
    (tmp_path / "one.txt").write_text("budget depth layer router token plan text model order")
    with pytest.raises(DataError, match="gives one window of 48 tokens, and two are needed"):
        export_run(finished / "buddy", budget="0.5", out=tmp_path / "out", data=str(tmp_path / "one.txt"))


def test_an_existing_folder_is_refused_before_anything_is_loaded(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("buddy.hub.export.load_model", lambda run: pytest.fail("loaded"))
    with pytest.raises(RunError, match="exists and is not overwritten"):
        export_run(finished / "buddy", budget="0.5", out=tmp_path)


def test_an_unfinished_run_is_refused(finished, tmp_path):
    shutil.copytree(finished / "buddy", tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(facts | {"status": "running"}))
    with pytest.raises(RunError, match="is not finished; go on with the same `buddy fit`"):
        export_run(tmp_path / "run", budget="0.5", out=tmp_path / "out")


def test_a_checkpoint_that_is_wrong_is_not_kept(finished, tmp_path, monkeypatch):
    def write_another(folder, backbone, kept):
        tiny_folder(folder, seed=3, num_hidden_layers=len(kept))

    monkeypatch.setattr("buddy.hub.export.write_checkpoint", write_another)
    with pytest.raises(RunError, match="more than rounding; nothing was written"):
        export_run(finished / "shortgpt", budget="0.75", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command(finished, tmp_path):
    words = ["export", "--run", finished / "shortgpt", "--budget", "0.5", "--out", tmp_path / "out", "--no-check"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(app, [str(word) for word in words])
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr.startswith("Error: ")
