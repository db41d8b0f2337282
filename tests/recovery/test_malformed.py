"""Some eighty malformed recipes and files; `python -m tests.soak --what malformed` draws a thousand."""

import re

import pytest

from buddy.data.text import load_texts
from buddy.errors import DataError
from tests.recovery.asking import refused
from tests.recovery.malformed import RAW, Bench, check_recipe, fuzz


@pytest.fixture
def bench(small, finished, tmp_path) -> Bench:
    return Bench(tmp_path, small, finished / "buddy")


def test_whatever_is_given_ends_well_or_with_one_sentence(bench):
    counts = fuzz(bench, 50, number=0)
    assert sum(counts.values()) > 80
    assert all(counts.values())


@pytest.mark.parametrize("text", RAW, ids=range(len(RAW)))
def test_the_darker_corners_of_yaml(bench, text, monkeypatch):
    monkeypatch.chdir(bench.work)
    check_recipe(bench, text.encode("utf-8", "surrogatepass"))
    assert [path.name for path in bench.work.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RAW[0], "its aliases stand for more than 10000 values"),
        ("router: &a {name: buddy, options: {a: *a}}", "an alias stands in what it refers to"),
        ("seed: !!python/object/apply:os.system ['touch planted']", "could not determine a constructor for the tag"),
        ("output: !!python/object/apply:pathlib.Path [x]", "could not determine a constructor|output must be text"),
        ("router: {name: buddy, options: {a: !!binary aGk=}}", "router.options must be a mapping"),
        ("seed: 1\nseed: 2", "found duplicate key seed"),
        ("data:\n\twindow: 4", "line 2: found character"),
        ("output: '${oc.env:HOME}'", r"output holds \$\{…\}, but a recipe takes plain values only"),
        ('output: "a\\0b"', "output is .*, which holds a sign that no file can"),
        ('output: "\\ud800"', "invalid Unicode character|holds a sign that no file can"),
        ("seed: 0x" + "f" * 4000, "a number has more than 1000 digits"),
        ("budgets: [{a: 1}]", "budgets must be a list of numbers"),
        ("a" * 2**21, "has 2097152 bytes, which no recipe has"),
    ],
)
def test_what_is_said(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert re.search(said, refused("fit", "--recipe", path))


@pytest.mark.parametrize("content", ["null", "  null\n", 'null\n{"text": "a"}'])
def test_json_that_begins_with_null(tmp_path, content):
    """Which Arrow's reader does not survive."""
    path = tmp_path / "text.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"text\.json begins with null where a text should be"):
        load_texts(str(path))
