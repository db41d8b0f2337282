"""What was measured, in memory and on disk."""

import torch

from buddy.calibration.store import Memo


class Shelf:
    """A store in memory that can be busy."""

    def __init__(self, **values: torch.Tensor) -> None:
        self.values, self.busy, self.written = values, False, []

    def read(self, keys):
        return {key: self.values[key] for key in keys if key in self.values}

    def write(self, values):
        if not self.busy:
            self.values |= values
            self.written.append(sorted(values))
        return not self.busy


ONE, TWO = torch.ones(1), torch.full((1,), 2.0)


def test_without_a_store_all_is_kept_in_memory():
    memo = Memo()
    memo["a"] = ONE
    memo.save()
    assert memo.missing(["b", "a", "c"]) == ["b", "c"]
    assert memo["a"] is ONE


def test_what_the_store_has_is_not_missing():
    memo = Memo(lambda: Shelf(a=ONE))
    assert memo.missing(["a", "b"]) == ["b"]
    assert memo["a"] is ONE


def test_values_are_written_now_and_then_and_each_once(monkeypatch):
    now = 0.0
    monkeypatch.setattr("buddy.calibration.store.time.monotonic", lambda: now)
    shelf = Shelf()
    memo = Memo(lambda: shelf)
    memo["a"] = ONE
    now = 1.9
    memo["b"] = TWO
    assert shelf.written == []
    now = 2.0
    memo["c"] = TWO
    assert shelf.written == [["a", "b", "c"]]
    memo["d"] = ONE
    memo.save()
    memo.save()
    assert shelf.written == [["a", "b", "c"], ["d"]]


def test_what_a_busy_store_refused_is_written_later():
    shelf = Shelf()
    memo = Memo(lambda: shelf)
    shelf.busy = True
    memo["a"] = ONE
    memo.save()
    shelf.busy = False
    memo["b"] = TWO
    memo.save()
    assert shelf.written == [["a", "b"]]
