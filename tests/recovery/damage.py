"""Ways in which a file can be damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], None]


def _rewritten(change: Callable[[bytes], bytes]) -> Damage:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def _flipped(whole: bytes) -> bytes:
    """One bit in the middle."""
    at = len(whole) // 2
    return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Damage] = {
    "missing": lambda path: path.unlink(),
    "cut": _rewritten(lambda whole: whole[: len(whole) // 2]),
    "empty": _rewritten(lambda _: b""),
    "flipped": _rewritten(_flipped),
    "zeros": _rewritten(lambda whole: bytes(len(whole))),
    "a list": _rewritten(lambda _: b"[1, 2]"),
    "another mapping": _rewritten(lambda _: b'{"format": 1, "results": 3, "backbone": [], "checksums": [1]}'),
    "a folder": _folder,
}


def copied(folder: Path, place: Path) -> Path:
    """A copy of a folder at a place, in the stead of what was there."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder, place)
    return place
