"""WikiText's marks are removed; other texts are left alone."""

import pytest
from datasets import Dataset

from buddy.data.documents import read_documents
from buddy.data.text import articles, plain, without_marks

TEXT = (
    " \n = Homarus gammarus = \n \n A well @-@ known <unk> weighs 0 @.@ 7 kg , or 1 @,@ 000 g . \n \n"
    " = = Description = = \n \n <unk> it is = and = not . \n \n = Next = \n \n It is short . \n"
)


def test_marks_are_removed():
    assert plain("a well @-@ known <unk> of 1 @,@ 000 @.@ 5 , @ home") == "a well-known of 1,000.5 , @ home"
    assert plain("<unk> first") == " first"


def test_articles_begin_with_titles_and_not_with_headings():
    parts = articles(TEXT)
    assert [part.split("\n")[0].strip() for part in parts] == ["= Homarus gammarus =", "= Next ="]
    assert "".join(parts) == TEXT.removeprefix(" \n")
    assert articles("before\n = Title = \nafter") == ["before\n", " = Title = \nafter"]


@pytest.mark.parametrize("text", ["plain text", "raw WikiText is well @-@ known", "code with <unk> tokens"])
def test_other_texts_are_left_alone(text, datasets_cache):
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
