"""Windows are spread over documents, and documents belong to one split only."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy.data.documents import read_documents
from buddy.data.windows import SPLIT, WINDOWS, generator, sample, split, spread
from buddy.errors import DataError

WINDOW = 10
wanted_windows = st.fixed_dictionaries({name: st.integers(0, 80) for name in ("test", "calibration", "validation")})


class Held:
    """Documents in memory: token t of document d is 1000 d + t."""

    def __init__(self, *lengths):
        self.lengths = np.array(lengths)

    def __len__(self):
        return len(self.lengths)

    def read(self, document):
        return 1000 * document + np.arange(self.lengths[document])

    def window(self, document, start, size):
        return self.read(document)[start : start + size]


@settings(deadline=None)
@given(st.lists(st.integers(10, 300), min_size=4, max_size=120), wanted_windows, st.integers(0, 9))
def test_each_document_is_in_one_split_and_most_are_trained_on(lengths, wanted, seed):
    parts = split(Held(*lengths), wanted, WINDOW, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(lengths)))
    assert len(parts["train"]) >= len(lengths) // 4
    assert len(parts["train"]) >= len(lengths) // 2 - 3
    assert all((len(parts[name]) > 0) == (count > 0) for name, count in wanted.items())


def test_the_asked_windows_are_met_where_there_is_text_for_them():
    wanted = {"test": 64, "calibration": 64, "validation": 16}
    many = split(Held(*[20] * 1000), wanted, WINDOW, 0)
    assert {name: len(part) for name, part in many.items()} == {**wanted, "train": 1000 - 144}
    short = Held(*[25] * 160)
    parts = split(short, wanted, WINDOW, 0)
    assert {name: 2 * len(parts[name]) for name in wanted} == wanted


def test_a_short_text_is_shared_in_proportion():
    parts = split(Held(*[10] * 40), {"test": 64, "calibration": 64, "validation": 16}, WINDOW, 0)
    assert [len(parts[name]) for name in ("train", "test", "calibration", "validation")] == [22, 8, 8, 2]


@settings(deadline=None)
@given(st.lists(st.integers(10, 300), min_size=1, max_size=30), st.integers(0, 60), st.integers(0, 9))
def test_windows_are_spread_evenly_and_do_not_overlap(lengths, count, seed):
    chosen = generator(seed, SPLIT).permutation(len(lengths))
    windows = spread(Held(*lengths), chosen, WINDOW, count, generator(seed, WINDOWS))
    whole = np.array(lengths) // WINDOW
    assert len(windows) == min(count, whole.sum())
    assert windows.input_ids.shape == (len(windows), WINDOW)
    assert windows.input_ids.dtype == windows.documents.dtype == torch.long
    assert len(windows.input_ids.unique()) == len(windows) * WINDOW
    assert torch.equal(windows.input_ids // 1000, windows.documents[:, None].expand(-1, WINDOW))
    taken = np.bincount(windows.documents.numpy(), minlength=len(lengths))
    most = taken.max(initial=0)
    assert ((taken >= most - 1) | (taken == whole)).all()


def test_windows_of_another_text(tmp_path, words):
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"body": f"{number} " * 25}) + "\n" for number in range(40)))

    def take(count, seed=0):
        return sample(read_documents(str(path), words, WINDOW, "body"), WINDOW, count, seed)

    windows = take(30)
    assert windows.input_ids.shape == (30, WINDOW)
    assert torch.equal(windows.input_ids, (windows.documents + 2)[:, None].expand(-1, WINDOW))
    assert len(windows.documents.unique()) == 30
    assert torch.equal(windows.input_ids, take(30).input_ids)
    assert not torch.equal(windows.input_ids, take(30, seed=1).input_ids)
    assert len(take(100)) == 80


def test_a_text_shorter_than_a_window(tmp_path, words):
    (tmp_path / "short.txt").write_text("1 2 3")
    with pytest.raises(DataError, match=r"short\.txt.*10 tokens"):
        read_documents(str(tmp_path / "short.txt"), words, WINDOW, "text")
