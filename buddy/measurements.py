"""Measured values of calibrations, latencies and predictors, in memory and in a file: nothing is measured twice.

One file holds the values measured under one setting: the same weights, windows and numerics, so that a stored value
equals a computed one bit for bit. Values are only ever appended, each as one line with its checksum, so several
processes may use a file at once, and what a kill or damage cuts is measured again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from buddy.console import stderr

WRITE_EVERY = 2.0  # seconds: the most that a kill loses


class Measurements:
    """Tensors by key, in memory and, if a folder is given, in a file; a stored value keeps every bit.

    If the folder cannot be used, values stay in memory, which is reported once on the error stream.

    Args:
        folder: holds the files; the first write creates it. None keeps values in memory only.
        setting: names and values of all that the measurements depend on; another setting is another file.
    """

    def __init__(self, folder: Path | None = None, setting: Mapping[str, Any] | None = None) -> None:
        named = {name: str(value) for name, value in (setting or {}).items()}
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        self.path = None if folder is None else folder / f"{digest[:20]}.txt"
        self._read_to = 0  # bytes of the file
        self._values: dict[str, Tensor] = {}
        self._unsaved: dict[str, Tensor] = {}
        self._saved_at = time.monotonic()

    def missing(self, keys: Collection[str]) -> list[str]:
        """Those keys that were not measured yet, in their order."""
        if any(key not in self._values for key in keys):
            self._read()
        return [key for key in keys if key not in self._values]

    def __getitem__(self, key: str) -> Tensor:
        return self._values[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._values[key] = self._unsaved[key] = value
        if time.monotonic() - self._saved_at >= WRITE_EVERY:
            self.save()

    def save(self) -> None:
        """Write all values that are not on disk yet."""
        if self._unsaved and self.path:
            lines = b"".join(_line(key, value) for key, value in self._unsaved.items())
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab") as file:
                    file.write(b"\n" + lines)  # a kill may have cut the last line
            except OSError as error:
                self._give_up(error)
        self._unsaved, self._saved_at = {}, time.monotonic()

    def _read(self) -> None:
        """Take over what was written to the file since the last call."""
        try:
            if self.path and self.path.exists():
                with open(self.path, "rb") as file:
                    file.seek(self._read_to)
                    lines = file.read().split(b"\n")
                self._read_to += sum(len(line) + 1 for line in lines[:-1])  # another process may be writing the last
                self._values |= dict(filter(None, map(_value, lines))) | self._unsaved
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        stderr.print(
            f"Measured values cannot be stored in {self.path.parent} ({error}), so they would be measured again; set "
            "BUDDY_CACHE (or BUDDY_CALIBRATION_CACHE, BUDDY_LATENCY_CACHE) to a folder that can be written."
        )
        self.path = None


def tensor_bytes(tensor: Tensor) -> bytes:
    """All bits of a tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def digest(*parts: bytes) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _line(key: str, value: Tensor) -> bytes:
    text = json.dumps([key, base64.b64encode(save({"": value})).decode()]).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _value(line: bytes) -> tuple[str, Tensor] | None:
    """The key and value of a line; None if it is damaged."""
    total, _, text = line.partition(b" ")
    if total != b"%08x" % zlib.crc32(text):
        return None
    key, value = json.loads(text)
    return key, load(base64.b64decode(value))[""]
