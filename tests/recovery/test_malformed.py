"""Some malformed recipes and files; `python -m tests.soak` draws a thousand."""

import re

import pytest

from tests.asking import refused
from tests.recovery.malformed import RAW, Bench, check_recipe, fuzz


@pytest.mark.slow
def test_whatever_is_given_ends_well_or_with_one_sentence(small, finished, tmp_path):
    assert all(fuzz(Bench(tmp_path, small, finished / "buddy"), 20, number=0).values())


@pytest.mark.parametrize("text", RAW, ids=range(len(RAW)))
def test_the_darker_corners_of_yaml(small, tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_recipe(Bench(tmp_path, small, tmp_path), text.encode("utf-8", "surrogatepass"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (RAW[0], "alias"),
        ("router: &a {name: buddy, options: {a: *a}}", "alias"),
        ("seed: !!python/object/apply:os.system ['touch planted']", "os.system"),
        ("router: {name: buddy, options: {a: !!binary aGk=}}", r"router\.options"),
        ("data:\n\twindow: 4", "line 2"),
        ("output: '${oc.env:HOME}'", r"\$\{"),
        ("a" * 2**21, "2097152"),
    ],
)
def test_the_error_names_the_mistake(tmp_path, text, named):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert re.search(named, refused("fit", "--recipe", path))
