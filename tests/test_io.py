"""Atomic writes, damaged files, the key → file store, and what a machine refuses."""

import errno
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from buddy.errors import DamagedError, RunError
from buddy.io import (
    check_output_path,
    new_folder,
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
        save_tensors(tmp_path / "file", {"view": base.T, "again": base, "half": base.bfloat16()})
        written.add((tmp_path / "file").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "a list", "a folder"])
def test_a_damaged_file_is_noticed(tmp_path, damage):
    path = tmp_path / "file.json"
    write_with_checksum(path, {"losses": (1.5, 2.25), 3: "x"})
    assert read_json(path) == {"losses": [1.5, 2.25], "3": "x"}
    DAMAGES[damage](path)
    with pytest.raises(DamagedError) as raised:
        read_json(path)
    assert raised.value.path == path


def test_output_paths_that_cannot_be_written(tmp_path):
    write_json(tmp_path / "input.json", {})
    check_output_path(tmp_path / "new.json", tmp_path / "input.json")
    os.mkfifo(tmp_path / "pipe")
    write_text(tmp_path / ("a" * 255), "the longest name")
    for path in (tmp_path, *map(tmp_path.joinpath, ["none/x.json", "input.json", "pipe", "a" * 256])):
        with pytest.raises(RunError):
            check_output_path(path, tmp_path / "input.json")


def test_a_link_stays_and_its_file_is_written(tmp_path):
    write_text(tmp_path / "file", "old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_what_lies_in_a_folder_that_is_read_is_not_overwritten(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    write_json(tmp_path / "run" / "checkpoints" / "last.json", {})
    check_output_path(tmp_path / "run" / "new.json", tmp_path / "run", "owner/name", "sotu")
    with pytest.raises(RunError, match="input"):
        check_output_path(tmp_path / "run" / "checkpoints" / "last.json", "owner/name", str(tmp_path / "run"))


def test_only_errors_of_the_disk_are_taken_for_such(tmp_path):
    with pytest.raises(RunError, match=str(tmp_path)), on_disk(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), on_disk(tmp_path):
        (tmp_path / "none").read_text()


def test_an_allocation_that_the_cpu_refuses():
    with pytest.raises(RunError, match="2 petabytes"), within_memory("2 petabytes", "ask for less"):
        torch.empty(2**51, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("x"), RunError),
        (MemoryError(), RunError),
        (RuntimeError("shapes differ"), RuntimeError),
    ],
)
def test_other_allocations_that_are_refused_and_other_errors(error, kind):
    with pytest.raises(kind), within_memory("it", "ask for less"):
        raise error


# A folder that appears whole or not at all


@pytest.mark.parametrize("error", [None, ValueError("x"), KeyboardInterrupt()])
def test_a_new_folder_appears_at_the_end_or_not_at_all(tmp_path, error):
    with nullcontext() if error is None else pytest.raises(type(error)), new_folder(tmp_path / "out") as made:
        (made / "a").write_text("1")
        assert not (tmp_path / "out").exists()
        if error:
            raise error
    assert [(path.name, (path / "a").read_text()) for path in tmp_path.iterdir()] == ([] if error else [("out", "1")])


def test_a_new_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("", "file", "link", "no/out", "x" * 300):
        with pytest.raises(RunError), new_folder(tmp_path / name):
            pass
    with pytest.raises(RunError), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()  # another process was quicker


def test_what_a_killed_process_left_of_a_new_folder_goes_with_the_next_call(tmp_path):
    work = "import os, pathlib\nfrom buddy.io import new_folder\nwith new_folder(pathlib.Path('out')):\n    os._exit(9)"
    assert subprocess.run([sys.executable, "-c", work], cwd=tmp_path).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    with new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_make_one_folder(tmp_path):
    work = "import pathlib\nfrom buddy.io import new_folder\nwith new_folder(pathlib.Path('out')):\n    pass"
    with new_folder(tmp_path / "out") as made:
        (made / "a").write_text("1")
        other = subprocess.run([sys.executable, "-c", work], cwd=tmp_path, capture_output=True, text=True)
        assert "Another process" in other.stderr
    assert [(path.name, (path / "a").read_text()) for path in tmp_path.iterdir()] == [("out", "1")]
