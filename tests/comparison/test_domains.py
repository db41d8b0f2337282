"""Which texts take part, and what is too short."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from buddy.config import load_recipe
from buddy.data.module import TextData
from buddy.errors import DataError
from buddy.schema import DataSection, Recipe
from buddy.worker import EvaluationText, read_windows, texts_of
from tests.small import write_text
from tests.tiny import tiny_tokenizer

OWN = EvaluationText("sotu", "sotu", own=True)


@pytest.fixture(scope="module")
def recipe(datasets_cache, tmp_path_factory) -> Recipe:
    folder = tmp_path_factory.mktemp("domains")
    write_text(folder / "other.jsonl", 40, seed=1)
    own = write_text(folder / "own.jsonl")
    data = DataSection(str(own), window=48, prompt=12, calibration_windows=2, validation_windows=2, test_windows=6)
    return Recipe(data=data)


@pytest.fixture(scope="module")
def data(recipe) -> TextData:
    sizes = {"calibration_windows": 2, "validation_windows": 2, "test_windows": 6}
    text = TextData(recipe.data.source, tiny_tokenizer(), window=48, **sizes)
    text.setup()
    return text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [OWN]),
        ("sotu", [OWN]),
        ("speeches=sotu", [EvaluationText("speeches", "sotu", own=True)]),
        ("a/c4.jsonl, wiki=b/x.txt", [OWN, EvaluationText("c4", "a/c4.jsonl"), EvaluationText("wiki", "b/x.txt")]),
        ("x.txt,sotu", [OWN, EvaluationText("x", "x.txt")]),
    ],
)
def test_the_recipes_own_text_is_always_first(text, expected):
    assert texts_of(text, Recipe()) == expected


def test_the_same_file_by_another_path_is_the_recipes_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("text")
    recipe = load_recipe("quickstart", ["data.source=mine.txt"])
    assert texts_of(f"m={tmp_path}/mine.txt", recipe) == [EvaluationText("m", "mine.txt", own=True)]


def test_a_folder_with_the_name_of_the_embedded_text_is_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sotu").mkdir()
    assert [text.own for text in texts_of("mine=./sotu", Recipe())] == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ", "--domains"),
        ("a/x.txt,b/x.txt", "'x'"),
        ("a/sotu.txt", "'sotu'"),
        ("a b.txt", "'a b'"),
        (f"{'a' * 61}=x.txt", "60"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        texts_of(text, Recipe())


def test_its_windows_are_cut_as_the_recipes_are(recipe, data):
    own, other = texts_of(recipe.data.source.replace("own", "other"), recipe)
    assert read_windows(own, recipe, data) is data.test
    windows = read_windows(other, recipe, data)
    assert windows.input_ids.shape == (6, 48)
    assert torch.equal(read_windows(other, recipe, data).input_ids, windows.input_ids)


def test_a_copy_of_a_text_that_is_fitted_to_is_refused(recipe, data, tmp_path):
    copy = shutil.copy(recipe.data.source, tmp_path / "copy.jsonl")
    with pytest.raises(DataError, match=r"copy\.jsonl"):
        read_windows(EvaluationText("copy", str(copy)), recipe, data)


def test_a_text_without_enough_windows_is_refused(recipe, data, tmp_path):
    short = write_text(tmp_path / "short.jsonl", 1)
    with pytest.raises(DataError, match=r"short\.jsonl.*data\.test_windows asks for 6"):
        read_windows(EvaluationText("short", str(short)), recipe, data)


@pytest.mark.parametrize(
    ("source", "label"),
    [("Salesforce/wikitext:wikitext-2-raw-v1", "wikitext-wikitext-2-raw-v1"), (f"{'a' * 80}.txt", "a" * 80)],
)
def test_the_recipes_own_label(source, label):
    assert [text.label for text in texts_of(None, Recipe(data=DataSection(source)))] == [label]


def test_a_file_in_a_folder_that_is_learned_from_is_no_domain(recipe):
    folder = Path(recipe.data.source).parent
    with pytest.raises(DataError, match=r"data\.source"):
        texts_of(str(folder / "other.jsonl"), replace(recipe, data=replace(recipe.data, source=str(folder))))
    trained = replace(recipe, data=replace(recipe.data, train_sources=[str(folder)]))
    with pytest.raises(DataError, match=r"data\.train_sources"):
        texts_of(str(folder / "other.jsonl"), trained)


@pytest.mark.parametrize("key", ["train_sources", "calibration_sources"])
def test_a_text_that_was_learned_from_is_no_domain(recipe, key):
    trained = replace(recipe, data=replace(recipe.data, **{key: ["web/c4.jsonl"]}))
    with pytest.raises(DataError, match=rf"data\.{key}"):
        texts_of("web/c4.jsonl", trained)


def test_validation_windows_come_from_documents_without_test_windows(recipe, data):
    _, other = texts_of(recipe.data.source.replace("own", "other"), recipe)
    choosing = replace(recipe, data=replace(recipe.data, evaluate_on="validation", validation_windows=4))
    chosen, tested = read_windows(other, choosing, data), read_windows(other, recipe, data)
    assert len(chosen) == 4
    assert not {*chosen.documents.tolist()} & {*tested.documents.tolist()}
    with pytest.raises(DataError, match=r"data\.validation_windows asks for 400.*data\.test_windows below 6"):
        read_windows(other, replace(choosing, data=replace(choosing.data, validation_windows=400)), data)
