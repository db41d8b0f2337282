"""Some thirty malformed recipes and files; `python -m tests.soak --what malformed` draws a thousand."""

import re

import pytest

from tests.recovery.asking import refused
from tests.recovery.malformed import RAW, Bench, check_recipe, fuzz


@pytest.fixture
def bench(small, finished, tmp_path) -> Bench:
    return Bench(tmp_path, small, finished / "buddy")


def test_whatever_is_given_ends_well_or_with_one_sentence(bench):
    counts = fuzz(bench, 20, number=0)
    assert sum(counts.values()) > 25
    assert all(counts.values())


@pytest.mark.parametrize("text", RAW, ids=range(len(RAW)))
def test_the_darker_corners_of_yaml(bench, text, monkeypatch):
    monkeypatch.chdir(bench.work)
    check_recipe(bench, text.encode("utf-8", "surrogatepass"))
    assert [path.name for path in bench.work.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (RAW[0], "alias"),
        ("router: &a {name: buddy, options: {a: *a}}", "alias"),
        ("seed: !!python/object/apply:os.system ['touch planted']", "os.system"),
        ("output: !!python/object/apply:pathlib.Path [x]", "output"),
        ("router: {name: buddy, options: {a: !!binary aGk=}}", r"router\.options"),
        ("seed: 1\nseed: 2", "seed"),
        ("data:\n\twindow: 4", "line 2"),
        ("output: '${oc.env:HOME}'", r"\$\{"),
        ('output: "a\\0b"', "output"),
        ("seed: 0x" + "f" * 4000, "digits"),
        ("budgets: [{a: 1}]", "budgets"),
        ("a" * 2**21, "2097152"),
    ],
)
def test_the_error_names_the_mistake(tmp_path, text, named):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert re.search(named, refused("fit", "--recipe", path))
