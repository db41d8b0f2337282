"""Several records as one, against the record that they are parts of."""

import json
from pathlib import Path

import pytest

from buddy.errors import RunError
from buddy.evaluation.record import joined, write_record
from buddy.evaluation.report import render, show_files
from buddy.evaluation.results import Results
from buddy.evaluation.tables import all_grids
from tests.comparison import made

A, B = Path("a/comparison.json"), Path("b/comparison.json")


def part(*chosen, **changed):
    """The runs of some routers alone, or ("ours", 1) for one seed of one, as made in a folder of their own."""
    whole = json.loads(json.dumps(made.record()))
    names = {label for label, _ in chosen}
    return whole | {
        "command": f"buddy compare --routers {','.join(sorted(names))}",
        "routers": [each for each in whole["routers"] if each["label"] in names],
        "runs": [run for run in whole["runs"] if (run["router"], run["seed"]) in chosen],
        "speed": None,
        **changed,
    }


def test_parts_give_the_tables_of_the_whole():
    whole = json.loads(json.dumps(made.record())) | {"speed": None}
    ours = [("ours", 0), ("dice", 1)]
    others = [(run["router"], run["seed"]) for run in whole["runs"] if (run["router"], run["seed"]) not in ours]
    together = joined({A: part(*ours), B: part(*others)})
    order = {each["label"]: place for place, each in enumerate(together["routers"])}
    whole["routers"].sort(key=lambda each: order[each["label"]])
    whole["runs"].sort(key=lambda run: order[run["router"]])
    assert list(all_grids(Results(together))) == list(all_grids(Results(whole)))


def test_the_document_says_how_each_part_was_made():
    machine = {"processor": "another", "cores": 4, "memory_gib": None, "accelerator": "one"}
    together = joined({A: part(("ours", 0)), B: part(("best", 0), machine=machine, created="2030-01-01T00:00:00")})
    text = render(Results(together), {})
    assert "buddy compare --routers ours\n" in text
    assert "buddy compare --routers best\n" in text
    assert "2030-01-01, another, 4 cores, one." in text


def test_seeds_may_come_from_recipes_that_differ_in_the_seed_alone():
    recipe = made.record()["recipe"] | {"seed": 1, "router.name": "dice", "output": "elsewhere"}
    together = joined({A: part(("ours", 0), ("dice", 0)), B: part(("ours", 1), recipe=recipe)})
    assert [(run["router"], run["seed"]) for run in together["runs"]] == [("ours", 0), ("ours", 1), ("dice", 0)]


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        (
            ["[0.01, 0.003]", "[0.003]"],
            "at the best of the rates 0.01, 0.003 or of 0.003 (each run's command says which)",
        ),
        (["[0.01, 0.003]", "[]"], "at the best of the rates 0.01, 0.003 or of 0.001 (each run's command says which)"),
        (["[0.01, 0.003]"] * 2, "at the best of the rates 0.01, 0.003 by validation windows"),
        (["[0.003]"] * 2, "at the rate 0.003."),
    ],
)
def test_seeds_may_be_healed_at_the_rate_that_another_seed_has_chosen(rates, words):
    lora = {"adapter.rank": 8, "adapter.steps": 100, "adapter.lr": 0.001, "data.batch_size": 4}
    one, other = (made.record()["recipe"] | lora | {"adapter.rates": tried} for tried in rates)
    together = joined({A: part(("ours", 0), recipe=one), B: part(("ours", 1), ("best", 0), recipe=other)})
    assert words in render(Results(together), {})


def test_a_run_that_failed_in_one_part_and_not_in_another_has_not_failed():
    failed = [{"router": label, "seed": 0, "reason": "it fell"} for label in ("best", "dice")]
    together = joined({A: part(("ours", 0), failures=failed), B: part(("best", 0), failures=[])})
    assert together["failures"] == failed[1:]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([("ours", 0), ("dice", 1)], "Each was fitted with one seed. All see"),
        ([("ours", 0), ("ours", 1), ("dice", 0), ("dice", 1)], "Each was fitted with 2 seeds. The text is the same"),
        ([("ours", 0), ("ours", 1), ("dice", 1)], "Fitted with several seeds: ours (2); the others once. The text"),
    ],
)
def test_the_document_says_how_many_seeds_there_are(runs, words):
    assert words in render(Results(joined({A: part(*runs)})), {})


def test_one_record_stays_as_it_is():
    assert joined({A: made.record()}) == made.record()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (part(("ours", 0)), r"The run ours, seed 0 is in a/comparison\.json and in b/comparison\.json"),
        (part(("best", 0), layers=9), r"made differently \(layers\)"),
        (part(("best", 0), tasks={"names": [], "limit": 3}), r"made differently \(tasks\)"),
        (
            part(("best", 0), recipe=made.record()["recipe"] | {"data.window": 77, "output": "elsewhere"}),
            r"made differently \(data\.window: \d+ and 77\)",
        ),
        (
            part(("best", 0), domains=[each | {"fingerprint": "0"} for each in made.record()["domains"][:1]]),
            r"made differently \(the text speeches; the text web\)",
        ),
        (
            part(("ours", 1), routers=[made.record()["routers"][0] | {"options": {"hidden": 3}}]),
            "call different routers ours; compare them in one folder",
        ),
    ],
)
def test_what_cannot_stand_together_is_refused(other, message):
    with pytest.raises(RunError, match=message):
        joined({A: part(("ours", 0)), B: other})


def test_files_are_read_joined_and_written(tmp_path, capsys):
    files = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, label in zip(files, ("ours", "best"), strict=True):
        write_record(path, part((label, 0)))
    show_files(files, tmp_path / "results.md")
    assert "Perplexity on web" in capsys.readouterr().out
    assert {"| ours |", "| best |"} <= {line[:8] for line in (tmp_path / "results.md").read_text().splitlines()}
