"""A folder that appears whole or not at all."""

import subprocess
import sys

import pytest

from buddy.errors import RunError
from buddy.io import new_folder


def test_it_appears_at_the_end(tmp_path):
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
    for name in ("", "file", "link", "no/out", "x" * 300):
        with pytest.raises(RunError), new_folder(tmp_path / name):
            pass
    with pytest.raises(RunError), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()  # another process was quicker


def test_what_a_killed_process_left_goes_with_the_next_call(tmp_path):
    work = "import os, pathlib\nfrom buddy.io import new_folder\nwith new_folder(pathlib.Path('out')):\n    os._exit(9)"
    assert subprocess.run([sys.executable, "-c", work], cwd=tmp_path).returncode == 9
    assert len(list(tmp_path.iterdir())) == 1
    with new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
