"""comparison.json: read back as it was, refused where it is none, and joined from parts."""

import json
from pathlib import Path

import pytest

from buddy.config import flatten, load_recipe
from buddy.errors import RunError
from buddy.evaluation.record import join, read_record, show_files, shown_command, write_record
from buddy.evaluation.results import Results
from buddy.evaluation.tables import all_tables
from buddy.run import complete_seeds, label_folder
from buddy.schema import COMPLETE
from tests.documents import ROOT
from tests.evaluation import made

STORED = ROOT / "docs" / "comparison"
A, B = Path("a/comparison.json"), Path("b/comparison.json")


def part(*chosen, **changed):
    """The runs ("ours", 1) of one seed of a router and so on alone, as made in a folder of their own."""
    whole = json.loads(json.dumps(made.record()))
    names = {label for label, _ in chosen}
    return whole | {
        "command": f"buddy compare --routers {','.join(sorted(names))}",
        "routers": [each for each in whole["routers"] if each["label"] in names],
        "runs": [run for run in whole["runs"] if (run["router"], run["seed"]) in chosen],
        "speed": None,
        **changed,
    }


def test_a_record_is_read_back_as_it_was(tmp_path):
    write_record(tmp_path / "comparison.json", made.record())
    text = (tmp_path / "comparison.json").read_text()
    assert read_record(tmp_path / "comparison.json") == json.loads(json.dumps(made.record()))
    assert len(text.splitlines()) < len(json.dumps(made.record(), indent=1).splitlines()) / 2


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        '{"format": 1}',
        '{"format": 2}',
        json.dumps(made.record() | {"runs": [{"router": "ours"}]}),
        json.dumps(made.record() | {"runs": []}),
        json.dumps(made.record() | {"recipe": {}}),
        json.dumps({key: value for key, value in made.record().items() if key != "failures"}),
    ],
)
def test_what_is_no_record_is_refused(content, tmp_path):
    path = tmp_path / "comparison.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunError, match=r"comparison\.json"):
        show_files([path])
    with pytest.raises(RunError, match="folder"):
        show_files([tmp_path])


def test_the_command_names_files_without_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jsonl").write_text("{}")
    words = ["buddy", "compare", "--domains", f"one=texts/a.jsonl,{tmp_path}/b.txt,owner/name", "router=a[b=1]"]
    assert shown_command(words) == "buddy compare --domains one=a.jsonl,b.txt,owner/name 'router=a[b=1]'"
    (tmp_path / "my texts").mkdir()
    (tmp_path / "my texts" / "a.txt").touch()
    assert shown_command([f"data.source={tmp_path}/my texts/a.txt"]) == "data.source=a.txt"
    words = [f"data.train_sources=[{tmp_path}/a.jsonl, texts/a.jsonl,owner/name]"]
    assert shown_command(words) == "'data.train_sources=[a.jsonl, a.jsonl,owner/name]'"


def test_parts_give_the_tables_of_the_whole():
    whole = json.loads(json.dumps(made.record())) | {"speed": None}
    ours = [("ours", 0), ("dice", 1)]
    others = [(run["router"], run["seed"]) for run in whole["runs"] if (run["router"], run["seed"]) not in ours]
    together = join({A: part(*ours), B: part(*others)})
    order = {each["label"]: place for place, each in enumerate(together["routers"])}
    whole["routers"].sort(key=lambda each: order[each["label"]])
    whole["runs"].sort(key=lambda run: order[run["router"]])
    tables = ([(table.title, table.head, table.rows) for table in all_tables(Results(r))] for r in (together, whole))
    assert next(tables) == next(tables)


# Of the recipe of that comparison; a comparison stores the type that `auto` means.
THEN = (
    "data.calibration_windows=32",
    "data.test_windows=32",
    "backbone.dtype=bfloat16",
    "objective.estimator=perturbed",
)


def test_keys_of_0_1_and_of_today_are_the_same_recipe():
    old, lists = read_record(STORED / "tasks" / "comparison.json"), "data.train_sources=[c4.jsonl,fineweb.jsonl]"
    assert {"trainer.nodes", "optimizer.lr_by_router"} <= old["recipe"].keys()
    for override, differs in (("seed=7", None), ("trainer.gradient_clip_val=1.0", "gradient_clip_val: 1.0 and 10.0")):
        recipe = load_recipe("comparison", [lists, "data.seed=0", "bridge=null", *THEN, override])
        parts = {A: old | {"recipe": flatten(recipe), "routers": [], "runs": []}, B: old}
        if differs:
            with pytest.raises(RunError, match=differs):
                join(parts)
        else:
            assert join(parts)["runs"] == old["runs"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (part(("best", 0), recipe=made.record()["recipe"] | {"data.window": 999}), r"data\.window"),
        (part(("best", 0), domains=made.record()["domains"][:1]), "web"),
        (part(("best", 0), layers=9), "layers"),
        (part(("best", 0), inputs={"model": "b"}), "the model"),
        (part(("best", 0), inputs={"task piqa": "b"}), "the task piqa"),
        (part(("best", 0), tasks={"names": [], "limit": None}), "tasks"),
        (part(("ours", 0)), "ours, seed 0"),
        (part(("ours", 1), routers=[made.record()["routers"][0] | {"options": {"a": 2}}]), "different routers ours"),
    ],
)
def test_what_cannot_be_joined_is_refused(other, named):
    with pytest.raises(RunError, match=named):
        join({A: part(("ours", 0), inputs={"model": "a", "text": "c", "task piqa": "d"}), B: other})


def test_inputs_of_a_file_that_is_not_the_first_are_compared_too():
    old, new = part(("ours", 0)), part(("best", 0), inputs={"details": "a"})
    with pytest.raises(RunError, match="the details"):
        join({A: old, B: new, Path("c/comparison.json"): part(("dice", 0), inputs={"details": "b"})})


@pytest.mark.parametrize(("other", "fixed"), [("a", "a"), ("b", "null"), ("null", "null")])
def test_settings_are_fixed_where_all_parts_were(other, fixed):
    recipes = [made.record()["recipe"] | {"fixed": each} for each in ("a", other)]
    whole = join({A: part(("ours", 0), recipe=recipes[0]), B: part(("best", 0), recipe=recipes[1])})
    assert whole["recipe"]["fixed"] == fixed


def test_a_failure_in_two_parts_is_one():
    failed = [{"router": "ours", "seed": 1, "reason": "it"}]
    assert join({A: part(("ours", 0), failures=failed), B: part(("best", 0), failures=failed)})["failures"] == failed


def test_a_record_may_lack_keys_of_a_later_version():
    whole = flatten(COMPLETE)
    older = {key: value for key, value in whole.items() if key not in ("bridge.joint", "adapter.joint")}
    assert len(join({A: part(("ours", 0), recipe=older), B: part(("best", 0), recipe=whole)})["runs"]) == 2
    with pytest.raises(RunError, match=r"bridge\.joint: False and True"):
        join({A: part(("ours", 0), recipe=older), B: part(("best", 0), recipe=whole | {"bridge.joint": True})})


def test_times_stay_where_they_were_measured_in_turn():
    speed = made.record()["speed"]
    speed["results"] = [each for each in speed["results"] if each["router"] == "ours"]
    timed, other = part(("ours", 0), speed=speed), part(("best", 0), ("full", 0))
    together = Results(join({A: timed, B: other}))
    measured = together.scores.loc["speeches"].decode_ms.unstack("router").notna()
    assert measured.to_dict("list") == {"ours": [True] * 3, "best": [False] * 3, "full": [False, False, True]}
    assert any(table.title.startswith("Decode") for table in all_tables(together))
    assert join({A: timed, B: other | {"speed": speed}})["speed"] is None


def test_another_estimator_is_free_where_no_router_learns():
    other = made.record()["recipe"] | {"objective.estimator": "surrogate", "objective.sigma": 0.3}
    fixed, learned = part(("best", 0), ("dice", 0)), part(("ours", 0), recipe=other)
    for parts in ({A: fixed, B: learned}, {A: learned, B: fixed}):
        together = join(parts)
        assert together["recipe"] == other
        assert len(together["runs"]) == 3
    with pytest.raises(RunError, match=r"objective\.estimator"):
        join({A: fixed, B: part(("ours", 1)), Path("c/comparison.json"): learned})
    with pytest.raises(RunError, match=r"objective\.kl"):
        join({A: fixed, B: part(("ours", 0), recipe=other | {"objective.kl": 0.5})})


def test_the_stored_runs_are_where_their_recipe_looks_for_them():
    recipe = load_recipe("comparison")
    folders = {label: label_folder(label) for label in (recipe.router.name, *(each.label for each in recipe.rivals))}
    record = read_record(STORED / "comparison.json")
    stored = {each["label"]: each["folder"] for each in record["routers"]}
    assert stored.items() <= folders.items()
    assert all(complete_seeds(STORED / folder) for folder in stored.values())
