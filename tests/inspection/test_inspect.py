"""`buddy inspect` on finished runs: numbers against a forward of its own, files, TensorBoard, and mistakes."""

import json
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from buddy.build import build_data, load_model
from buddy.cli import app
from buddy.errors import BudgetError, DataError, RunError
from buddy.inspection.inspect import inspect_run
from buddy.run import read_run
from tests.small import write_text

FILES = {"budgets.png", "tokens-0.75.png", "tokens-0.5.png", "routing.json"}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def numbers(folder) -> dict:
    return json.loads((folder / "routing.json").read_text())


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("events")}


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


def test_numbers_are_those_of_a_forward(finished, out):
    inspect_run(finished / "buddy", out=out, windows=3)
    run = read_run(finished / "buddy")
    routed = load_model(run)
    data = build_data(run.recipe, routed.backbone)
    data.setup()
    ids = data.test.input_ids[:3]
    found = numbers(out)
    assert [(entry["budget"], entry["layers"]) for entry in found["budgets"]] == [("1", 6), ("0.75", 4), ("0.5", 3)]
    label = next(iter(found["domains"]))
    assert found["domains"] == {
        "text": {"source": run.recipe.data.source, "windows": 3, "tokens_a_window": 48, "documents": 3}
    }
    for entry in found["budgets"]:
        with torch.no_grad():
            output = routed(ids, executed=torch.full((3,), entry["layers"]), prompt=run.recipe.data.prompt)
        assert entry["text"] == ["".join(str(int(ran)) for ran in plan) for plan in output.runs[0]]
        plans = output.runs[:, 1:]
        measured = entry["domains"][label]
        assert measured["share"] == pytest.approx(plans.double().mean((0, 1)).tolist())
        assert measured["share"] == entry["share"]
        assert measured["changes"] == pytest.approx((plans[:, 1:] != plans[:, :-1]).any(-1).double().mean().item())
        assert measured["executed"] == [entry["layers"]] * 3
        distinct, counts = plans.reshape(-1, 6).unique(dim=0, return_counts=True)
        assert measured["plans"] == len(distinct)
        assert measured["commonest"] == counts.max().item() / plans[..., 0].numel()
        assert entry["commonest_plan"] in [row.nonzero()[:, 0].tolist() for row in distinct[counts == counts.max()]]
    assert found["text"]["tokens"] == ids[0].tolist()
    assert len(found["text"]["words"]) == 48
    assert (found["layers"], found["always_on"], found["sink_tokens"]) == (6, [0, 5], 1)
    assert names(out) == FILES


@pytest.mark.parametrize("name", ["shortgpt", "uniform", "random"])
def test_a_static_router_has_one_plan_at_each_budget(finished, out, name):
    inspect_run(finished / name, out=out, windows=2)
    for entry in numbers(out)["budgets"]:
        (measured,) = entry["domains"].values()
        assert set(measured["share"]) <= {0.0, 1.0}
        assert sum(measured["share"]) == entry["layers"]
        assert (measured["changes"], measured["apart"], measured["plans"], measured["distinct"]) == (0, 0, 1, 1)
        assert (measured["commonest"], measured["off_commonest"]) == (1, 0)
        assert len(set(entry["text"][1:])) == 1
    assert names(out) == FILES


def test_a_router_that_runs_every_layer(finished, out, capsys):
    inspect_run(finished / "full", out=out, windows=2)
    (entry,) = numbers(out)["budgets"]
    assert (entry["budget"], entry["layers"], set(entry["text"])) == ("1", 6, {"111111"})
    assert names(out) == {"budgets.png", "tokens-1.png", "routing.json"}
    assert "100.0 %" in capsys.readouterr().out


def test_the_table(finished, out, capsys):
    inspect_run(finished / "uniform", out=out, windows=2, budgets=["0.5"])
    shown = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    signs = "".join("█" if share else "·" for share in numbers(out)["budgets"][0]["share"])
    assert cells == [
        ["0.5 (3)", "text", "0.0 %", "0.00", "1", "1.0", "100.0 %", "0.0 %"],
        ["0.5 (3)", "text", signs],
    ]
    assert (
        "text: 94 tokens in 2 windows of 2 documents; sink tokens, run at full depth and left out: 1 a window." in shown
    )
    assert f"Pictures:    budgets.png, tokens-0.5.png in {out}\n" in shown
    assert f"JSON:        {out}/routing.json\n" in shown


def test_domains(finished, out, tmp_path, small):
    other = write_text(tmp_path / "other.jsonl", seed=5)
    asked = f"{small.text},a={other}, {other} "
    inspect_run(finished / "buddy", out=out, windows=2, domains=asked, budgets=["0.5"])
    found = numbers(out)
    assert list(found["domains"]) == ["text", "a", "other"]
    assert found["budgets"][0]["domains"]["a"] == found["budgets"][0]["domains"]["other"]
    assert names(out) == {"budgets.png", "domains-0.5.png", "tokens-0.5.png", "routing.json"}


def test_the_recipes_own_text_by_name_is_its_test_text(finished, tmp_path, small):
    for name, domains in (("default", None), ("named", f"mine={small.text}")):
        inspect_run(finished / "buddy", out=tmp_path / name, windows=2, domains=domains, budgets=["0.5"])
    default, named = (numbers(tmp_path / name) for name in ("default", "named"))
    assert default["budgets"][0]["text"] == named["budgets"][0]["text"]
    assert default["text"]["tokens"] == named["text"]["tokens"]


def test_one_text_is_shown_token_by_token(finished, out, capsys):
    inspect_run(finished / "buddy", out=out, text="Four $cores$\n")
    shown = capsys.readouterr().out
    found = numbers(out)
    assert found["text"]["words"] == [*"Four", "␣", *"$cores$", "↵"]
    lines = shown[shown.index("Budget 0.75: 4 of 6 layers. Layers 0 to 5 from left to right") :].splitlines()[2:15]
    plans = next(entry["text"] for entry in found["budgets"] if entry["budget"] == "0.75")
    for line, word, plan in zip(lines, found["text"]["words"], plans, strict=True):
        signs = "".join("·█"[int(ran)] for ran in plan[1:-1])
        assert line.startswith(f"{word}  ▒{signs}▒")
    assert lines[0].endswith("  sink")
    assert names(out) == FILES


def test_a_run_keeps_its_own_pictures(finished, tmp_path):
    """The place is the run folder where none is named; a second call leaves nothing of the first in TensorBoard."""
    folder = tmp_path / "buddy"
    shutil.copytree(finished / "buddy", folder)
    before = names(folder)
    for windows in (1, 2):
        inspect_run(folder, windows=windows)
    assert names(folder) == {*before, "routing"}
    assert names(folder / "routing") == FILES
    assert len(list(folder.glob("events.*.inspect"))) == 1
    read_run(folder)
    seen = events(folder)
    assert {tag: [event.step for event in seen.Images(tag)] for tag in seen.Tags()["images"]} == {
        "routing/budgets": [0],
        "routing/tokens": [3, 4],
    }
    assert {"test/perplexity", "routing/plan_changes/text"} <= set(seen.Tags()["scalars"])
    written = {event.step: event.value for event in seen.Scalars("routing/plan_changes/text")}
    expected = {e["layers"]: e["domains"]["text"]["changes"] for e in numbers(folder / "routing")["budgets"]}
    assert written == {step: pytest.approx(value, rel=1e-6) for step, value in expected.items()}


def test_json_goes_where_it_is_told(finished, out, tmp_path):
    inspect_run(finished / "uniform", out=out, windows=1, budgets=["4layers"], json_file=tmp_path / "n.json")
    assert json.loads((tmp_path / "n.json").read_text())["budgets"][0]["budget"] == "4layers"
    assert names(out) == {"budgets.png", "tokens-4layers.png"}


def test_another_call_leaves_nothing_of_the_first(finished, out, tmp_path, small):
    others = {"tokens-of-mine.png", "domains-0.5.jpg", "my-tokens-0.5.png", "notes.json"}
    out.mkdir()
    for name in others:
        (out / name).touch()
    other = write_text(tmp_path / "other.jsonl", seed=5)
    asked = f"{small.text},a={other}"
    inspect_run(finished / "uniform", out=out, windows=1, domains=asked, budgets=["0.75", "3layers"])
    drawn = {f"{kind}-{budget}.png" for kind in ("tokens", "domains") for budget in ("0.75", "3layers")}
    assert names(out) == {"budgets.png", "routing.json", *drawn, *others}
    inspect_run(finished / "uniform", out=out, windows=1, budgets=["0.5"], json_file=tmp_path / "n.json")
    assert names(out) == {"budgets.png", "tokens-0.5.png", *others}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budgets": ["1.5"]}, BudgetError, r"The budget 1\.5 is not above 0 and at most 1"),
        ({"budgets": ["0.1"]}, BudgetError, r"The budget 0\.1 is below the layers that always run"),
        ({"budgets": ["much"]}, BudgetError, "neither a fraction such as 0.75 nor a count"),
        ({"text": " \n"}, DataError, "The text to look at is empty; give some words"),
        ({"text": "a"}, DataError, "The text has too few tokens, 1: the first 1 run at full depth whatever the budget"),
        ({"text": "a" * 600}, DataError, "The text has 600 tokens, but .* reads at most 512; shorten it"),
        ({"text": "abc", "domains": "x.txt"}, DataError, "--text looks at that text alone; leave out --domains"),
        ({"text": "abc", "windows": 3}, DataError, "--text looks at that text alone; leave out"),
        ({"domains": " , "}, DataError, "--domains is empty; name at least one text"),
        ({"domains": "=x.txt"}, DataError, "The domain '=x.txt' lacks its label or its source; write label=SOURCE"),
        ({"domains": "a="}, DataError, "The domain 'a=' lacks its label or its source"),
        (
            {"domains": "a=x.txt,a=y.txt"},
            DataError,
            "Two domains are called 'a'; tell them apart, as in --domains",
        ),
        ({"domains": "nothing.txt"}, DataError, r"There is no file or folder nothing\.txt"),
        ({"domains": "a=short.txt"}, DataError, r"short\.txt is too short for one window of 48 tokens; give more text"),
        ({"out": "a_file"}, RunError, "a_file is a file; name a folder for the pictures"),
        ({"out": "no/where"}, RunError, "There is no folder .*/no for where; make it first"),
        ({"json_file": "no/where.json"}, RunError, r"There is no folder .*/no for where\.json; make it first"),
    ],
)
def test_mistakes_are_said_and_leave_nothing(finished, tmp_path, monkeypatch, options, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "a_file").touch()
    paths = {name: tmp_path / options[name] for name in ("out", "json_file") if name in options}
    before = names(tmp_path)
    with pytest.raises(error, match=message):
        inspect_run(finished / "buddy", **{"out": tmp_path / "out", **options, **paths})
    assert names(tmp_path) == before


def test_less_than_everything_from_a_router_of_full_depth(finished, out):
    with pytest.raises(BudgetError, match=r"This router runs every layer; ask for budget 1\.0 instead of 0\.5"):
        inspect_run(finished / "full", out=out, budgets=["0.5"])


def test_the_command(finished, out):
    words = ["inspect", "--run", str(finished / "uniform"), "--budget", "0.5", "--text", "Hello", "--out", str(out)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "Budget 0.5: 3 of 6 layers." in result.stdout
    assert np.all([plan.count("1") == 3 for plan in numbers(out)["budgets"][0]["text"][1:]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--run", "nowhere"], "Error: There is no run folder nowhere"),
        (["--run", "r", "--budgets", ","], "Error: --budgets is empty"),
        (["--run", "r", "--windows", "0"], "Invalid value for '--windows'"),
        ([], "Missing option '--run'"),
    ],
)
def test_the_command_ends_with_2(words, message):
    result = CliRunner().invoke(app, ["inspect", *words])
    assert result.exit_code == 2
    assert message in result.stderr


def test_help_has_one_worked_example():
    assert CliRunner().invoke(app, ["inspect", "--help"]).output.count("Example: buddy inspect") == 1
