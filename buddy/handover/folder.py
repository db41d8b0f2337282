"""A new folder that appears whole or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from buddy.errors import RunError
from buddy.io import alive, writing


def check_new(out: Path) -> None:
    """Raises RunError when no folder can be made at `out`: something is there, or the place for it is missing."""
    out = out.absolute()
    if os.path.lexists(out):  # os.path, unlike Path, answers for any text: a name of 300 letters, say
        raise RunError(f"{out} exists and is not overwritten; name a new folder.")
    if not os.path.isdir(out.parent):
        raise RunError(f"There is no folder {out.parent} for {out.name}; make it first.")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to be filled in the block. It becomes `out` when the block ends well, or else goes away.

    What a killed process left there is removed by the next call.

    Raises:
        RunError: `out` exists, before the block or after it, or its place cannot be written.
    """
    out = out.absolute()
    check_new(out)
    beside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    with writing(out):
        for leftover in _leftovers(out):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir()
    try:
        yield beside
        check_new(out)  # another process may have been quicker
        with writing(out):
            beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _leftovers(out: Path) -> list[Path]:
    """Folders of processes that are gone, and of this one's earlier calls."""
    name = re.compile(rf"\.{re.escape(out.name)}\.partial-(\d+)")
    found = [(path, name.fullmatch(path.name)) for path in out.parent.iterdir()]
    return [path for path, match in found if match and (int(match[1]) == os.getpid() or not alive(int(match[1])))]
