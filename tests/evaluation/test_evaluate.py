"""`evaluate_run` on a finished run: its own text, another text, other budgets."""

import json
import shutil

import pytest

from buddy.builders.data import build_held_out
from buddy.compare import fit
from buddy.errors import BudgetError, DataError, RecipeError, RunError
from buddy.evaluation.evaluate import evaluate_run, show_scores
from buddy.hub.export import export_run
from buddy.run import read_run
from tests.evaluation import made
from tests.small import rewrite, write_text
from tests.tiny import tiny_backbone

pytestmark = pytest.mark.slow


def numbers(result: dict) -> tuple:
    return result["budget"], result["layers"], result["perplexity"], result["kl"], result["tokens"]


@pytest.mark.parametrize("name", ["buddy", "full"])
def test_a_run_says_again_what_it_said_when_it_was_made(finished, tmp_path, name, capsys):
    evaluate_run(finished / name, json_file=tmp_path / "curve.json")
    again = json.loads((tmp_path / "curve.json").read_text())
    metrics = json.loads((finished / name / "metrics.json").read_text())
    assert set(again) == {"results"}
    assert again["results"] == metrics["results"]
    out, err = capsys.readouterr()
    assert f"JSON: {tmp_path}/curve.json\n" in out
    assert f"Evaluating {name}: 2 of 2" in err


def test_other_budgets(finished, tmp_path):
    evaluate_run(finished / "buddy", json_file=tmp_path / "curve.json", budgets=["5layers", "0.5", "1"])
    results = json.loads((tmp_path / "curve.json").read_text())["results"]
    assert [(result["budget"], result["layers"]) for result in results] == [(5 / 6, 5), (0.5, 3), (1.0, 6)]
    metrics = json.loads((finished / "buddy" / "metrics.json").read_text())["results"]
    assert numbers(results[1]) == numbers(metrics[2])


def test_another_text(finished, tmp_path, capsys):
    text = write_text(tmp_path / "other.jsonl", seed=5)
    evaluate_run(finished / "buddy", json_file=tmp_path / "curve.json", data=str(text))
    results = json.loads((tmp_path / "curve.json").read_text())["results"]
    metrics = json.loads((finished / "buddy" / "metrics.json").read_text())["results"]
    assert [result["layers"] for result in results] == [6, 4, 3]
    assert all(one["perplexity"] != other["perplexity"] for one, other in zip(results, metrics, strict=True))
    assert f"buddy on {text}" in " ".join(capsys.readouterr().out.split())


def test_texts_that_were_trained_on_are_not_needed(small, tmp_path):
    texts = [write_text(tmp_path / f"{name}.jsonl", 40, seed=7) for name in ("trained", "calibrated")]
    more = [f"data.train_sources=[{texts[0]}]", f"data.calibration_sources=[{texts[1]}]"]
    fit(small(tmp_path / "runs", "rivals=[]", "trainer.max_steps=1", *more), "small")
    run = tmp_path / "runs" / "small" / "buddy" / "seed-0"
    for text in texts:
        text.unlink()
    evaluate_run(run, json_file=tmp_path / "curve.json")
    metrics = json.loads((run / "metrics.json").read_text())
    assert json.loads((tmp_path / "curve.json").read_text())["results"] == metrics["results"]
    assert len(build_held_out(read_run(run).recipe, tiny_backbone("llama")).validation) == 2
    with pytest.raises(DataError, match=r"calibrated\.jsonl"):
        build_held_out(read_run(run).recipe, tiny_backbone("llama"), calibration=True)


def test_what_cannot_be_evaluated(finished, tmp_path):
    with pytest.raises(RunError, match="nowhere"):
        evaluate_run(finished / "buddy", json_file=tmp_path / "nowhere" / "curve.json")
    with pytest.raises(BudgetError, match=r"0\.5"):
        evaluate_run(finished / "full", budgets=["0.5"])
    with pytest.raises(DataError, match=r"nothing\.txt"):
        evaluate_run(finished / "buddy", data="nothing.txt")


def test_shared_plans_are_refused_where_a_mean_is_asked_for(finished, tmp_path):
    run = rewrite(shutil.copytree(finished / "buddy", tmp_path / "buddy"), "reroute_every: 1", "reroute_every: 2")
    with pytest.raises(RecipeError, match="mean_over"):
        evaluate_run(run, mean_over=8)


def test_a_text_that_changed_since_and_one_that_was_trained_on(small, tmp_path):
    own, trained = (write_text(tmp_path / f"{name}.jsonl", 40, seed=len(name)) for name in ("own", "trained"))
    texts = [f"data.source={own}", f"data.train_sources=[{trained}]"]
    fit(small(tmp_path / "runs", "router=uniform", "rivals=[]", "bridge=null", *texts), "small")
    run = tmp_path / "runs" / "small" / "uniform" / "seed-0"
    evaluate_run(run, json_file=tmp_path / "curve.json", data=str(own))
    metrics = json.loads((run / "metrics.json").read_text())
    assert json.loads((tmp_path / "curve.json").read_text())["results"] == metrics["results"]
    with pytest.raises(DataError, match=r"trained\.jsonl"):
        evaluate_run(run, data=str(trained))
    for text in (own, trained):  # as from another folder, where the recipe's relative names lead nowhere
        moved = shutil.copy(text, tmp_path / "moved.jsonl")
        with pytest.raises(DataError, match=r"moved\.jsonl"):
            evaluate_run(run, data=str(moved))
    with pytest.raises(DataError, match=r"moved\.jsonl"):
        export_run(run, budget="0.75", out=tmp_path / "out", data=str(moved))
    with own.open("a") as file:
        file.write(json.dumps({"text": "a later document " * 40}) + "\n")
    with pytest.raises(RunError, match=r"own\.jsonl"):
        evaluate_run(run)
    before = own.read_bytes()
    with pytest.raises(RunError, match=r"own\.jsonl is an input"):
        evaluate_run(run, json_file=own)
    assert own.read_bytes() == before
    with pytest.raises(RunError, match=r"own\.jsonl"):
        export_run(run, budget="0.75", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_router_that_changed_its_shape_since(finished, tmp_path):
    folder = rewrite(shutil.copytree(finished / "buddy", tmp_path / "buddy"), "options: {}", "options: {hidden: 7}")
    with pytest.raises(RunError, match=str(folder)):
        evaluate_run(folder)


def test_the_table_has_a_row_for_each_budget(capsys):
    scores = [made.scores(0.5, 4.0), made.scores(1.0, 3.0)]
    show_scores(scores, "buddy on /data/[/odd].txt", {0.5: "4layers", 1.0: "1"})
    out = capsys.readouterr().out
    low, high = scores[0].interval()
    assert "buddy on /data/[/odd].txt" in out
    (row,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["4layers"]]
    assert row == ["4layers", "4", "4", "/", "4.00", "/", "4", "54.60", f"{low:.2f}", "–", f"{high:.2f}", "0.0800"]
    assert f"{10 * made.DOCUMENTS} scored tokens in {made.DOCUMENTS} documents" in out


def test_the_split_is_the_one_asked_for(finished, tmp_path):
    tokens = {}
    for split in ("test", "validation"):
        evaluate_run(finished / "uniform", json_file=tmp_path / f"{split}.json", split=split, budgets=["0.5"])
        tokens[split] = json.loads((tmp_path / f"{split}.json").read_text())["results"][0]["tokens"]
    assert tokens == {"test": 6 * 36, "validation": 2 * 36}
