"""A folder that appears whole or not at all."""

import os
import subprocess
import sys

import pytest

from buddy.errors import RunError
from buddy.io import check_new, new_folder


def test_it_appears_at_the_end_with_all_that_was_written(tmp_path):
    with new_folder(tmp_path / "out") as made:
        (made / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "1"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_nothing_is_left_where_the_block_fails(tmp_path, error):
    with pytest.raises(type(error)), new_folder(tmp_path / "out") as made:  # noqa: PT012
        (made / "a").write_text("1")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("", "file", "link"):
        with pytest.raises(RunError, match="exists and is not overwritten; name a new folder"):
            check_new(tmp_path / name)
    with pytest.raises(RunError, match=r"There is no folder .*/no for out; make it first"):
        check_new(tmp_path / "no" / "out")
    with pytest.raises(RunError, match=r"cannot be written .*File name too long"), new_folder(tmp_path / ("x" * 300)):
        pass


def test_who_comes_second_is_refused_and_the_first_stays(tmp_path):
    with pytest.raises(RunError, match="exists and is not overwritten"), new_folder(tmp_path / "out") as made:  # noqa: PT012
        (made / "a").write_text("2")
        (tmp_path / "out").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_another_makes_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".out.partial-{gone.pid}").mkdir()
    (tmp_path / f".out.partial-{os.getppid()}").mkdir()
    (tmp_path / ".other.partial-1").mkdir()
    (tmp_path / f".out.partial-{10**20}").mkdir()  # more than any process can have
    with new_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".other.partial-{1}",
        f".out.partial-{os.getppid()}",
        "out",
    ]
