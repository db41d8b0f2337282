"""Damaged files, and disks that are full or read-only."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

Damage = Callable[[Path], None]


def _rewritten(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def _flipped(content: bytes) -> bytes:
    """One bit in the middle."""
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Damage] = {
    "missing": lambda path: path.unlink(),
    "empty": _rewritten(lambda _: b""),
    "cut": _rewritten(lambda content: content[: len(content) // 2]),
    "flipped": _rewritten(_flipped),
    "noise": _rewritten(lambda content: bytes(i * 151 % 256 for i in range(len(content)))),
    "another mapping": _rewritten(lambda _: b'{"format": 1, "results": 3, "backbone": [], "checksums": [1]}'),
    "a folder": _folder,
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copied(folder: Path, target: Path) -> Path:
    """A copy of a folder, in place of what was at the target."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk in memory of so many bytes ("64k") at a new folder; the test is skipped where it may not be mounted."""
    folder.mkdir()
    if not mount(folder, f"size={size}"):
        pytest.skip("a disk in memory may not be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def mount(folder: Path, options: str) -> bool:
    """Mount a disk in memory, or change the options of one; whether that worked."""
    if shutil.which("mount") is None:
        return False
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(words, capture_output=True).returncode == 0


class FailingDisk:
    """A folder in which one file cannot be written.

    Args:
        folder: whose files are counted.
        number: of the file that finds the disk full, in the order in which files are opened for writing; 0 for none.

    Attributes:
        opened: paths of the files that were opened for writing, relative to the folder.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number, self.opened = str(folder), number, []

    @contextmanager
    def active(self) -> Iterator[FailingDisk]:
        """Files fail within this block."""
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
