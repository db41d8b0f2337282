"""Disks that are full or read-only: a small one in memory where it may be mounted, and one that fails on demand."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A disk of so many bytes ("64k") at a new folder; the test is skipped where it may not be mounted."""
    place.mkdir()
    if not mount(place, f"size={size}"):
        pytest.skip("a disk in memory may not be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def mount(place: Path, options: str) -> bool:
    """Mount a disk in memory, or change the options of one; whether that worked."""
    if shutil.which("mount") is None:
        return False
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    return subprocess.run(words, capture_output=True).returncode == 0


class FailingDisk:
    """Opened files below a folder, of which one refuses to be written.

    Args:
        folder: whose files are counted.
        number: of the file, in the order in which they are opened for writing, that finds the disk full; 0 for none.

    Attributes:
        opened: the files that were opened for writing, as seen from the folder.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number, self.opened = str(folder), number, []

    @contextmanager
    def under(self) -> Iterator[FailingDisk]:
        """Files are opened through it within this block."""
        with pytest.MonkeyPatch.context() as patch:
            for module in (builtins, io):
                patch.setattr(module, "open", self._open)
            yield self

    def _open(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        opened = _OPEN(file, mode, *args, **options)
        if isinstance(file, str | os.PathLike) and os.fspath(file).startswith(self._folder) and set(mode) & set("wxa+"):
            self.opened.append(str(Path(file).relative_to(self._folder)))
            if len(self.opened) == self._number:
                opened.write = _full
        return opened


_OPEN = io.open


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
