"""Some eighty malformed recipes and files; `python -m tests.soak --what malformed` draws a thousand."""

import pytest

from buddy.data.text import load_texts
from buddy.errors import DataError
from tests.recovery.asking import refused
from tests.recovery.malformed import RAW, Bench, check_recipe, fuzz


@pytest.fixture
def bench(small, finished, tmp_path) -> Bench:
    return Bench(tmp_path, small, finished / "buddy")


@pytest.mark.slow
def test_whatever_is_given_ends_well_or_with_one_sentence(bench):
    counts = fuzz(bench, 50, number=0)
    assert sum(counts.values()) > 80
    assert all(counts.values())


@pytest.mark.parametrize("text", RAW, ids=range(len(RAW)))
def test_the_darker_corners_of_yaml(bench, text, monkeypatch):
    monkeypatch.chdir(bench.work)
    check_recipe(bench, text.encode("utf-8", "surrogatepass"))
    assert [path.name for path in bench.work.iterdir()] == ["mine.yaml"]


def test_a_file_of_megabytes_is_no_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("a" * 2**21)
    assert str(2**21) in refused("fit", "--recipe", path)


@pytest.mark.parametrize("content", ["null", "  null\n", 'null\n{"text": "a"}'])
def test_json_that_begins_with_null(tmp_path, content):
    """Which Arrow's reader does not survive."""
    path = tmp_path / "text.json"
    path.write_text(content)
    with pytest.raises(DataError, match="null"):
        load_texts(str(path))
