"""Atomic writes, damaged files, the key → file store, and what a machine refuses."""

import errno
import os

import pytest
import torch

from buddy.errors import DamagedError, RunError
from buddy.io import (
    FileStore,
    check_output_path,
    on_disk,
    read_json,
    save_tensors,
    within_memory,
    write_json,
    write_text,
    write_with_checksum,
)
from tests.recovery.damage import DAMAGES


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch, broken, error):
    def fail(*_: object) -> None:
        raise error

    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        write_text(tmp_path / "file", "new")
    assert isinstance(error, KeyboardInterrupt) or "No space left" in str(raised.value)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    base, written = torch.arange(12.0).reshape(3, 4), set()
    for _ in range(9):
        save_tensors(tmp_path / "file", {"view": base.T, "again": base, "half": base.bfloat16()}, {"format": "pt"})
        written.add((tmp_path / "file").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped", "zeros", "a list", "pickle", "a folder"])
def test_a_damaged_file_is_noticed(tmp_path, damage):
    path = tmp_path / "file.json"
    write_with_checksum(path, {"losses": (1.5, 2.25), 3: "x"})
    assert read_json(path) == {"losses": [1.5, 2.25], "3": "x"}
    DAMAGES[damage](path)
    with pytest.raises(DamagedError) as raised:
        read_json(path)
    assert raised.value.path == path


class TestFileStore:
    def test_values_come_back_from_another_store_of_the_same_folder(self, tmp_path):
        store = FileStore(tmp_path / "cache" / "deep")
        assert store.get("a") is None
        for key, value in {"a": {"x": [1, 2.5]}, "b/../c": [True, None], "d" * 999: "text"}.items():
            store.put(key, value)
            assert FileStore(tmp_path / "cache" / "deep").get(key) == value
        store.put("a", 3)
        assert store.get("a") == 3

    @pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "another mapping", "noise"])
    def test_a_damaged_value_is_absent_and_may_be_put_again(self, tmp_path, damage):
        store = FileStore(tmp_path)
        store.put("a", {"x": 1})
        DAMAGES[damage](store.path("a"))
        assert store.get("a") is None
        store.put("a", {"x": 2})
        assert store.get("a") == {"x": 2}

    def test_a_file_under_another_keys_name_is_absent(self, tmp_path):
        store = FileStore(tmp_path)
        store.put("a", 1)
        store.path("a").rename(store.path("b"))
        assert store.get("b") is None

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError):
            FileStore(tmp_path / "file").put("a", 1)


def test_output_paths_that_cannot_be_written(tmp_path):
    write_json(tmp_path / "input.json", {})
    check_output_path(tmp_path / "new.json", tmp_path / "input.json")
    for path in (tmp_path, tmp_path / "none" / "x.json", tmp_path / "input.json"):
        with pytest.raises(RunError):
            check_output_path(path, tmp_path / "input.json")


def test_only_errors_of_the_disk_are_taken_for_such(tmp_path):
    with pytest.raises(RunError, match=str(tmp_path)), on_disk(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), on_disk(tmp_path):
        (tmp_path / "none").read_text()


def test_an_allocation_that_the_cpu_refuses():
    with pytest.raises(RunError, match="2 petabytes"), within_memory("2 petabytes", "ask for less"):
        torch.empty(2**51, dtype=torch.uint8)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError()])
def test_an_allocation_that_others_refuse(error):
    with pytest.raises(RunError), within_memory("it", "ask for less"):
        raise error


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), within_memory("it", "ask for less"):
        raise RuntimeError("shapes differ")
