"""What the work of a comparison shares between runs: tasks at full depth, where all are the stock model."""

import json
from dataclasses import replace
from functools import partial

import pytest
from lm_eval.tasks import TaskManager

import buddy.evaluation.tasks as tasks
from buddy.compare import CompareConfig, compare
from buddy.config import load_recipe
from buddy.io import read_json
from buddy.schema import Rival
from buddy.worker import Tasks
from tests.evaluation.own_task import define

ROUTERS = ("buddy", "shortgpt", "full")
ITEMS = [{"question": f"Which is {n}?", "choices": ["one", "two words"], "label": n % 2} for n in range(5)]


@pytest.fixture
def ask(small, tmp_path):
    """Makes an `CompareConfig` of three routers and a task with overrides of the recipe."""
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))

    def ask(*overrides: str) -> CompareConfig:
        overrides = ("trainer.max_steps=2", *overrides)
        options = {"routers": [Rival(name) for name in ROUTERS], "seeds": 1, "speed": False, "out": tmp_path / "out"}
        wanted = Tasks(("piqa",), None, tmp_path, None)
        return CompareConfig(load_recipe(small.file, overrides), "small", tasks=wanted, **options)

    return ask


@pytest.fixture
def scored(monkeypatch):
    """Budgets that tasks were scored at, run by run."""
    found, real = [], tasks.task_scores

    def task_scores(folder, names, budgets, *rest):
        found.append((folder.parent.name, list(budgets)))
        return real(folder, names, budgets, *rest)

    monkeypatch.setattr("buddy.evaluation.tasks.task_scores", task_scores)
    return found


@pytest.mark.slow
def test_full_depth_is_scored_once(ask, scored, tmp_path):
    assert compare(ask()) == 0
    assert scored == [("buddy", [1.0, 0.75, 0.5]), ("shortgpt", [0.75, 0.5])]
    record = read_json(tmp_path / "out" / "comparison.json")
    assert len(record["inputs"]["items of piqa"].strip()) == 16
    for run in record["runs"]:
        folder = tmp_path / "out" / run["router"] / "seed-0"
        asked = [1.0] if run["router"] == "full" else [1.0, 0.75, 0.5]
        alone = tasks.task_scores(folder, ["piqa"], asked, None, tmp_path)["results"]
        assert run["tasks"] == alone


@pytest.mark.slow
def test_full_depth_may_come_first_and_not_be_asked_again(ask, scored, tmp_path):
    asked = replace(ask("budgets=[0.99,0.5]"), routers=[Rival("full"), Rival("shortgpt")])
    assert compare(asked) == 0
    assert scored == [("full", [1.0]), ("shortgpt", [0.5])]
    record = read_json(tmp_path / "out" / "comparison.json")
    found = [(entry["budget"], entry["layers"]) for entry in record["runs"][1]["tasks"]]
    assert found == [(0.99, 6), (0.5, 3)]


@pytest.mark.slow
def test_a_changed_definition_and_changed_items_are_scored_anew(ask, scored, tmp_path):
    own, items = tmp_path / "own", tmp_path / "items.jsonl"
    own.mkdir()
    asked = replace(ask(), routers=[Rival("shortgpt")], tasks=Tasks(("mine",), None, None, own))
    for asks, count, times in (("question", 2, 1), ("question", 2, 1), ("choices[0]", 2, 2), ("choices[0]", 1, 3)):
        rows = [json.dumps({"question": "a", "choices": ["b", "c"], "label": 0}) + "\n"] * count
        items.write_text("".join(rows))
        define(own, items, doc_to_text=f"{{{{{asks}}}}}")
        assert compare(asked) == 0
        assert len(scored) == times
        (run,) = read_json(tmp_path / "out" / "comparison.json")["runs"]
        assert {entry["items"] for entry in run["tasks"]} == {count}


@pytest.mark.slow
def test_tasks_of_a_group_are_scored_one_by_one(ask, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # seconds less
    own = tmp_path / "own"
    own.mkdir()
    for name in ("mine", "yours"):
        define(own, tmp_path / "piqa.jsonl", name)
    (own / "both.yaml").write_text("group: both\ntask: [mine, yours]\n")
    routers = [Rival("shortgpt"), Rival("uniform")]
    assert compare(replace(ask(), routers=routers, tasks=Tasks(("both",), None, None, own))) == 0
    for run in read_json(tmp_path / "out" / "comparison.json")["runs"]:
        assert [(each["task"], each["budget"]) for each in run["tasks"]] == [
            (task, budget) for task in ("mine", "yours") for budget in (1.0, 0.75, 0.5)
        ]


@pytest.mark.slow
def test_healed_runs_are_scored_at_full_depth_too(ask, scored):
    assert compare(ask("adapter.steps=1")) == 0
    assert scored == [("buddy", [1.0, 0.75, 0.5]), ("shortgpt", [1.0, 0.75, 0.5]), ("full", [1.0])]
