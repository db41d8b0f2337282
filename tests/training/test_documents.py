"""Rows become documents: cut where one dominates, packed where they are short, tokenised once."""

import json
from copy import deepcopy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from buddy.data.documents import cut, pack, read_documents
from buddy.errors import DataError


def jsonl(path, rows):
    """A file of rows, each given as numbers: the words of the row."""
    path.write_text("".join(json.dumps({"text": " ".join(map(str, row))}) + "\n" for row in rows))
    return str(path)


def test_rows_of_a_window_or_more_are_documents_as_they_are(tmp_path, words):
    rows = [np.arange(n, n + 8 + n % 5) for n in range(40)]
    read = read_documents(jsonl(tmp_path / "a.jsonl", rows), words, window=8)
    assert read.lengths.tolist() == [len(row) for row in rows]
    assert read.tokens == sum(read.lengths)
    for number, row in enumerate(rows):
        assert read.read(number).tolist() == (row + 2).tolist()
        assert read.read(number).dtype == np.int64


def test_short_rows_are_packed_with_their_neighbours(tmp_path, words):
    rows = [[1, 1, 1], list(range(10, 19)), [2, 2], [], [3, 3], [4] * 8, [5]]
    rounds = [[100 * number + word for word in row] for number in range(4) for row in rows]
    read = read_documents(jsonl(tmp_path / "a.jsonl", rounds), words, window=8)
    tokens = [read.read(number).tolist() for number in range(len(read))]
    assert tokens[:3] == [[12, *range(13, 21)], [3, 3, 3, 1, 4, 4, 1, 5, 5], [6] * 8]
    assert read.lengths.tolist() == [len(document) for document in tokens]
    assert tokens[4] == [7, 1, 103, 103, 103, 1, 104, 104]  # the last row of the first round begins the next pack


def test_short_rows_may_repeat(tmp_path, words):
    rows = [row for number in range(40) for row in ([7, 7, 7], [], np.arange(number, number + 9))]
    read = read_documents(jsonl(tmp_path / "a.jsonl", rows), words, window=8)
    assert sum((read.read(number) == 9).sum() for number in range(len(read))) == 3 * 40 + 8


def test_rows_that_repeat_an_earlier_one_are_left_out(tmp_path, words):
    rows = [np.arange(n, n + 9) for n in range(40)]
    once = read_documents(jsonl(tmp_path / "once.jsonl", rows), words, window=8)
    twice = read_documents(jsonl(tmp_path / "twice.jsonl", [*rows, *rows[::-1]]), words, window=8)
    assert twice.digest == once.digest
    rest = read_documents(
        str(tmp_path / "once.jsonl"),
        words,
        window=8,
        other=read_documents(jsonl(tmp_path / "some.jsonl", rows[5:30]), words, window=8),
    )
    assert [rest.read(number)[0] - 2 for number in range(len(rest))] == [*range(5), *range(30, 40)]


def test_rows_that_differ_in_white_space_at_their_ends_are_repeated(tmp_path, words):
    texts = [" ".join(map(str, range(n, n + 9))) for n in range(40)]
    for name, end in (("own", ""), ("lines", "\n")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text + end}) + "\n" for text in texts))
    own = read_documents(str(tmp_path / "own.jsonl"), words, window=8)
    with pytest.raises(DataError, match="Every row"):
        read_documents(str(tmp_path / "lines.jsonl"), words, window=8, other=own)


def test_one_long_text_is_cut_at_paragraphs(tmp_path, words):
    paragraphs = [" ".join(str(number % 10) for number in range(start, start + 40)) for start in range(0, 20_000, 40)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    read = read_documents(str(path), words, window=20)
    assert set(read.lengths[:-1].tolist()) <= {160, 200, 240}
    assert 80 <= len(read) <= 125
    together = np.concatenate([read.read(number) for number in range(len(read))])
    assert together.tolist() == [number % 10 + 2 for number in range(20_000)]


def test_the_text_is_tokenised_once(tmp_path, words, monkeypatch):
    source = jsonl(tmp_path / "a.jsonl", [[word] * 10 for word in range(20)])
    first = read_documents(source, words, window=8)
    same = deepcopy(words)
    same.backend_tokenizer.enable_truncation(4)  # what another use of a tokenizer leaves behind
    call = type(words).__call__

    def one_text_alone(self, text, **options):
        assert isinstance(text, str), "tokenised again"
        return call(self, text, **options)

    monkeypatch.setattr(type(words), "__call__", one_text_alone)
    again = read_documents(source, same, window=8)
    assert again.read(19).tolist() == first.read(19).tolist() == [21] * 10


def test_another_tokenizer_is_not_served_from_the_cache(tmp_path, words):
    other = deepcopy(words)
    other.add_tokens(["77"])
    other.add_special_tokens({"eos_token": "<end>"})
    source = jsonl(tmp_path / "a.jsonl", [[1, 77, 1, 77, word] for word in range(100, 140)])
    assert 1 in read_documents(source, words, window=8).read(0)
    assert 1 not in read_documents(source, other, window=8).read(0)
    assert other.eos_token_id in read_documents(source, other, window=8).read(0)


def test_special_tokens_come_from_the_tokenizer_alone(tmp_path, words):
    starting = deepcopy(words)
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    source = jsonl(tmp_path / "a.jsonl", [[word] * 9 for word in range(3, 23)])
    assert read_documents(source, starting, window=8).read(0).tolist() == [1] + [5] * 9
    assert read_documents(source, words, window=8).read(0).tolist() == [5] * 9


def test_packed_rows_have_one_mark_between_them(tmp_path, words):
    source = jsonl(tmp_path / "a.jsonl", [[word] * 2 for word in range(3, 27)])
    ending, plain = deepcopy(words), deepcopy(words)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert read_documents(source, ending, window=8).read(0).tolist() == [5, 5, 1, 6, 6, 1, 7, 7, 1]
    plain.eos_token = None
    between = plain("\n\n", add_special_tokens=False).input_ids
    assert read_documents(source, plain, window=6).read(0).tolist()[: 2 + len(between)] == [5, 5, *between]


def test_windows_begin_as_the_tokenizer_begins_texts(tmp_path, words):
    written_out = ["<begin>", *range(9), "<eos>"]
    source = jsonl(tmp_path / "a.jsonl", [written_out, *[range(word, word + 9) for word in range(60)]])
    starting = deepcopy(words)
    starting.add_special_tokens({"bos_token": "<begin>"})
    begin = starting.bos_token_id
    known = read_documents(source, starting, window=4)
    assert known.window(1, 5, 4).tolist() == [7, 8, 9, 10]  # it has the token, and does not add it
    special = [("<begin>", begin)]
    starting.backend_tokenizer.post_processor = TemplateProcessing(single="<begin> $A", special_tokens=special)
    added = read_documents(source, starting, window=4)
    assert added.window(1, 0, 4).tolist() == added.read(1)[:4].tolist() == [begin, 2, 3, 4]
    assert added.window(1, 6, 4).tolist() == [begin, 8, 9, 10]
    assert 1 in read_documents(source, starting, window=16).read(0)[:-1], "an end token between two rows of a pack"


@settings(deadline=None)
@given(st.text(alphabet="ab \n", max_size=400), st.integers(1, 60))
def test_cut_parts_are_the_text(text, size):
    parts = cut(text, size)
    assert "".join(parts) == text
    assert all(size <= len(part) <= 1.25 * size + 2 for part in parts[:-1])
    assert len(parts[-1]) <= 2.25 * size


def test_cut_keeps_paragraphs_lines_and_words_together_in_this_order():
    assert cut("aaaa\naaa aaa\n\n" * 9, 14)[0] == "aaaa\naaa aaa\n\n"
    text = "x" * 98 + "{}" + "y" * 300
    assert cut(text.format("  a b\nc d\n\ne"), 100)[0].endswith("c d\n\n")
    assert cut(text.format("  a b\nc de"), 100)[0].endswith("a b\n")
    assert cut(text.format("  a b c de"), 100)[0].endswith("  a ")
    assert len(cut(text.format(""), 100)[0]) == 100


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 20), st.integers(0, 1))
def test_packs_hold_a_window_and_each_row_at_most_once(lengths, window, gap):
    packs = pack(lengths, window, gap)
    rows = [row for rows in packs for row in rows]
    assert len(rows) == len(set(rows))
    assert all(sum(lengths[row] for row in rows) + gap * (len(rows) - 1) >= window for rows in packs)
    assert all(list(rows) == sorted(rows) for rows in packs)
    dropped = [row for row in range(len(lengths)) if row not in rows]
    assert all(len(rows) == 1 for rows in packs) or not dropped
    assert sum(lengths[row] + gap for row in dropped) < window + gap
