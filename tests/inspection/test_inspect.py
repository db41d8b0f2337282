"""`buddy inspect` on finished runs: numbers against a forward of its own, files, TensorBoard, and mistakes."""

import json
import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from buddy.builders.data import build_data
from buddy.builders.model import load_model
from buddy.errors import BudgetError, DataError, RunError
from buddy.inspection.inspect import inspect_run
from buddy.run import read_run
from tests.asking import call
from tests.small import rewrite, write_text

FILES = {"budgets.png", "tokens-0.75.png", "tokens-0.5.png", "routing.json"}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def numbers(folder) -> dict:
    return json.loads((folder / "routing.json").read_text())


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("events")}


def test_numbers_are_those_of_a_forward(finished, out):
    inspect_run(finished / "buddy", out=out, windows=3)
    run = read_run(finished / "buddy")
    routed = load_model(run)
    data = build_data(run.recipe, routed.backbone)
    data.setup()
    ids = data.test.input_ids[:3]
    found = numbers(out)
    assert [(entry["budget"], entry["layers"]) for entry in found["budgets"]] == [("1", 6), ("0.75", 4), ("0.5", 3)]
    assert found["domains"] == {
        "text": {"source": run.recipe.data.source, "windows": 3, "tokens_a_window": 48, "documents": 3}
    }
    for entry in found["budgets"]:
        with torch.no_grad():
            output = routed(ids, executed=torch.full((3,), entry["layers"]), prompt=run.recipe.data.prompt)
        assert entry["text"] == ["".join(str(int(ran)) for ran in plan) for plan in output.runs[0]]
        plans, ran = output.runs[:, 1:], output.executed[:, 1:].double()
        assert entry["executed"] == {"min": ran.min(), "mean": ran.mean(), "max": ran.max()}
        assert entry["share"] == pytest.approx(plans.double().mean((0, 1)).tolist())
        assert entry["domains"]["text"]["share"] == entry["share"]
        distinct, counts = plans.reshape(-1, 6).unique(dim=0, return_counts=True)
        assert entry["domains"]["text"]["plans"] == len(distinct)
        assert entry["commonest_plan"] in [row.nonzero()[:, 0].tolist() for row in distinct[counts == counts.max()]]
    assert found["text"]["tokens"] == ids[0].tolist()
    assert len(found["text"]["words"]) == 48
    assert (found["layers"], found["always_on"], found["sink_tokens"], found["mean_over"]) == (6, [0, 5], 1, 1)
    assert names(out) == FILES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shortgpt", "full"])
def test_a_static_router_has_one_plan_at_each_budget(finished, out, name):
    inspect_run(finished / name, out=out, windows=2)
    entries = numbers(out)["budgets"]
    assert [entry["layers"] for entry in entries] == ([6] if name == "full" else [6, 4, 3])
    for entry in entries:
        (measured,) = entry["domains"].values()
        assert sum(measured["share"]) == entry["layers"]
        assert (measured["changes"], measured["apart"], measured["plans"], measured["distinct"]) == (0, 0, 1, 1)
        assert (measured["commonest"], measured["off_commonest"]) == (1, 0)
        assert len(set(entry["text"][1:])) == 1


@pytest.mark.slow
def test_domains(finished, out, tmp_path, small):
    other = write_text(tmp_path / "other.jsonl", seed=5)
    inspect_run(finished / "buddy", out=out, windows=2, budgets=["0.5"])
    own = numbers(out)
    (out / "notes.json").touch()
    (out / "tokens-of-mine.png").touch()
    domains = f"mine={small.text},a={other}, {other} "
    inspect_run(finished / "buddy", out=out, windows=2, domains=domains, budgets=["3layers"])
    found = numbers(out)
    assert list(found["domains"]) == ["mine", "a", "other"]
    assert found["budgets"][0]["domains"]["a"] == found["budgets"][0]["domains"]["other"]
    shares = [measured["share"] for measured in found["budgets"][0]["domains"].values()]
    assert found["budgets"][0]["share"] == pytest.approx([sum(each) / 3 for each in zip(*shares, strict=True)])
    assert found["budgets"][0]["text"] == own["budgets"][0]["text"], "of the recipe's own text the test windows"
    figures = {"budgets.png", "domains-3layers.png", "tokens-3layers.png"}
    assert names(out) == {*figures, "routing.json", "notes.json", "tokens-of-mine.png"}


def test_one_text_is_shown_token_by_token(finished, out):
    words = ["--text", "Four $cores$\n", "--out", out, "--json", out / "n.json"]
    result = call("inspect", "--run", finished / "buddy", *words)
    assert result.exit_code == 0, result.output
    assert names(out) == FILES - {"routing.json"} | {"n.json"}
    found = json.loads((out / "n.json").read_text())
    assert found["text"]["words"] == [*"Four", "␣", *"$cores$", "↵"]
    plans = next(entry["text"] for entry in found["budgets"] if entry["budget"] == "0.75")
    lines = result.output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("F  "))
    for number, (word, plan) in enumerate(zip(found["text"]["words"], plans, strict=True)):
        signs = "".join("·█"[int(ran)] for ran in plan)
        assert lines[start + number].startswith(f"{word}  {signs if number == 0 else f'▒{signs[1:-1]}▒'}")


def test_budgets_in_the_mean_are_named(finished, out, tmp_path, capsys):
    run = rewrite(shutil.copytree(finished / "buddy", tmp_path / "buddy"), "mean_over: 1\n", "mean_over: 8\n")
    inspect_run(run, out=out, text="a layer and a budget and a plan", budgets=["0.5"])
    assert "3 of 6 layers in the mean over 8 tokens" in capsys.readouterr().out
    assert numbers(out)["mean_over"] == 8


@pytest.mark.slow
def test_files_go_into_the_run_folder_and_replace_older_ones(finished, tmp_path):
    folder = shutil.copytree(finished / "buddy", tmp_path / "buddy")
    for windows in (1, 2):
        inspect_run(folder, windows=windows)
    folder = read_run(folder).folder
    assert names(folder / "routing") == FILES
    assert len(list(folder.glob("events.*.inspect"))) == 1
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    images = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert images == {"routing/budgets": [0], "routing/tokens": [3, 4]}
    written = {event.step: event.value for event in events.Scalars("routing/plan_changes/text")}
    expected = {e["layers"]: e["domains"]["text"]["changes"] for e in numbers(folder / "routing")["budgets"]}
    assert written == {step: pytest.approx(value, rel=1e-6) for step, value in expected.items()}


def test_files_are_written_before_tables_whose_reader_may_leave(finished, out, monkeypatch):
    def leave(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("buddy.inspection.inspect.print_titled_table", leave)
    with pytest.raises(BrokenPipeError):
        inspect_run(finished / "buddy", windows=1, out=out)
    assert names(out) >= FILES


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"budgets": ["0.1"]}, BudgetError, "0.1"),
        ({"budgets": ["much"]}, BudgetError, "much"),
        ({"text": "a"}, DataError, "too few tokens"),
        ({"text": "a" * 600}, DataError, "512"),
        ({"text": "abc", "domains": "x.txt"}, DataError, "--domains"),
        ({"text": "abc", "windows": 3}, DataError, "--windows"),
        ({"domains": " , "}, DataError, "--domains"),
        ({"domains": "=x.txt"}, DataError, "=x.txt"),
        ({"domains": "a="}, DataError, "a="),
        ({"domains": "a=x.txt,a=y.txt"}, DataError, "'a'"),
        ({"domains": "nothing.txt"}, DataError, "nothing.txt"),
        ({"domains": "a=short.txt"}, DataError, "short.txt"),
        ({"domains": "a=copy.jsonl"}, DataError, "copy.jsonl"),
        ({"out": "a_file"}, RunError, "a_file"),
        ({"out": "no/where"}, RunError, "no"),
        ({"json_file": "no/where.json"}, RunError, "no"),
    ],
)
def test_mistakes_leave_nothing(finished, small, tmp_path, monkeypatch, options, error, named):
    monkeypatch.chdir(tmp_path)
    shutil.copy(small.text, "copy.jsonl")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "a_file").touch()
    paths = {name: tmp_path / options[name] for name in ("out", "json_file") if name in options}
    before = names(tmp_path)
    with pytest.raises(error, match=named):
        inspect_run(finished / "buddy", **{"out": tmp_path / "out", **options, **paths})
    assert names(tmp_path) == before
