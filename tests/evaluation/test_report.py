"""Tables, figure, JSON and TensorBoard curves of given results."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.config import flatten
from buddy.evaluation.report import draw, settings_of, show_comparison, write_run_results
from buddy.evaluation.tables import show_scores
from buddy.scoring.perplexity import Scores, as_json
from tests.hparams import row_of_table


def made(budget: float, layers: int, mean: float, spread: float = 1.0) -> Scores:
    loss = 10 * mean + spread * np.arange(-2.0, 3.0)
    executed = (layers, float(layers), layers)
    return Scores(budget, layers, executed, 1, loss, loss / 100, np.full(5, 10.0))


OURS = [made(0.5, 3, 4.0), made(1.0, 6, 3.0), made(0.75, 4, 3.5)]
THEIRS = [made(0.5, 3, 4.5), made(1.0, 6, 3.0), made(0.75, 4, 3.51, 1.5)]
ONLY = [made(1.0, 6, 3.0)]
REST = {"fit": {"seconds": 1.5, "parameters": 7}, "windows": "0123456789abcdef"}


def test_json_has_the_layout_that_others_read():
    results = as_json(OURS)["results"]
    low, high = OURS[0].interval()
    assert json.loads(json.dumps(results[0])) == {
        "budget": 0.5,
        "layers": 3,
        "executed": {"min": 3, "mean": 3.0, "max": 3},
        "sink_tokens": 1,
        "perplexity": pytest.approx(math.exp(4.0)),
        "kl": pytest.approx(0.04),
        "interval": [low, high],
        "documents": 5,
        "tokens": 50,
    }
    assert [result["budget"] for result in results] == [0.5, 1.0, 0.75]


def test_the_table_of_one_run(capsys):
    show_scores(OURS, "buddy on /data/[/odd].txt")
    out = capsys.readouterr().out
    low, high = OURS[0].interval()
    assert "buddy on /data/[/odd].txt" in out
    cells = [cell.strip() for cell in next(line for line in out.splitlines() if " 0.5 " in line).split("│")[1:-1]]
    assert cells == ["0.5", "3", "3 / 3.00 / 3", "54.60", f"{low:.2f} – {high:.2f}", "0.0400"]
    assert "50 scored tokens in 5 documents; sink tokens, run at full depth and counted apart: 1 a window." in out


def test_routers_side_by_side(tmp_path, capsys):
    folders = {name: tmp_path / name for name in ("ours", "theirs", "full")}
    folders["ours"].mkdir()
    show_comparison({"ours": OURS, "theirs": THEIRS, "full": ONLY}, folders, "ours")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in rows]
    assert cells[:3] == [
        ["ours", "20.09", "33.12", "54.60"],
        ["theirs", "20.09", "33.45", "90.02"],
        ["full", "20.09", "–", "–"],
    ]
    certain, doubtful = cells[3][3], cells[3][2]
    assert certain == "-0.500 (-0.500, -0.500)*"
    assert doubtful.startswith("-0.010 (")
    assert not doubtful.endswith("*")
    saved = json.loads((tmp_path / "ours" / "comparison.json").read_text())
    assert saved["ours"] == as_json(OURS)
    assert {(entry["router"], entry["budget"]) for entry in saved["differences"]} == {
        *(("theirs", budget) for budget in (0.5, 0.75, 1.0)),
        ("full", 1.0),
    }


def test_few_documents_are_said_to_have_no_marks(tmp_path, capsys):
    few = {
        name: [replace(each, loss=each.loss[:4], kl=each.kl[:4], tokens=each.tokens[:4]) for each in group]
        for name, group in {"ours": OURS, "theirs": THEIRS}.items()
    }
    show_comparison(few, {"ours": tmp_path, "theirs": tmp_path}, "ours")
    said = " ".join(capsys.readouterr().out.split())
    assert "none is marked below 5 documents" in said
    assert "-0.500 (-0.500, -0.500) " in said


def test_one_router_alone_is_compared_with_nobody(tmp_path, capsys):
    show_comparison({"ours": OURS}, {"ours": tmp_path}, "ours")
    assert "minus others" not in capsys.readouterr().out
    assert "differences" not in json.loads((tmp_path / "comparison.json").read_text())


def test_the_figure(tmp_path):
    draw({"ours": OURS, "theirs": THEIRS, "full": ONLY}, tmp_path / "loss.png")
    image = Image.open(tmp_path / "loss.png")
    assert image.format == "PNG"
    assert image.size == (1050, 675)
    colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1_000_000)}
    assert {(0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E), (0x2C, 0xA0, 0x2C)} <= colours, "a line for each router"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_curves_have_executed_layers_as_steps(small, tmp_path):
    recipe = small(tmp_path)
    write_run_results(tmp_path, recipe, OURS, **REST)
    events = EventAccumulator(str(tmp_path)).Reload()
    curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = {layers: math.exp(mean) for layers, mean in ((3, 4.0), (4, 3.5), (6, 3.0))}
    assert curves["test/perplexity"] == [(k, pytest.approx(value, rel=1e-6)) for k, value in expected.items()]
    assert curves["test/loss"] == [(k, pytest.approx(math.log(value), rel=1e-6)) for k, value in expected.items()]
    assert [step for step, _ in curves["test/kl"]] == [3, 4, 6]
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"{key}: {value}" in text for key, value in flatten(recipe).items())


def test_settings_and_results_are_a_row_of_the_table_of_hyper_parameters(small, tmp_path):
    recipe = small(tmp_path, "router.options.hidden=3", "router.options.prior=none")
    write_run_results(tmp_path, recipe, OURS, **REST)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [], "and in no run of its own"
    events = EventAccumulator(str(tmp_path)).Reload()
    settings, columns = row_of_table(events)
    assert settings == settings_of(recipe)
    assert settings["router.options"] == "hidden=3, prior=none"
    assert len(set(columns)) == len(columns) == 3 + 2
    values = {tag: events.Scalars(tag)[0].value for tag in columns}
    assert values["hparams/perplexity_at_0.5"] == pytest.approx(math.exp(4.0))
    assert values["hparams/fit_seconds"] == 1.5
    (tmp_path / "full").mkdir()
    write_run_results(tmp_path / "full", recipe, ONLY, **REST)
    assert set(row_of_table(EventAccumulator(str(tmp_path / "full")).Reload())[1]) == set(columns)
    assert settings_of(recipe).keys() == settings_of(small(tmp_path, "router=uniform")).keys()


def test_metrics_hold_the_sums_of_every_document(small, tmp_path):
    write_run_results(tmp_path, small(tmp_path), OURS, **REST)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert {"fit": saved["fit"], "windows": saved["windows"]} == REST
    assert saved["results"] == as_json(OURS)["results"]
    assert [document["budget"] for document in saved["documents"]] == [0.5, 1.0, 0.75]
    assert saved["documents"][0]["loss"] == OURS[0].loss.tolist()
