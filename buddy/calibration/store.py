"""Measured values of a calibration: in memory, and in SQLite so that an interrupted search resumes.

One SQLite file holds the values measured under one setting: the same weights, windows and numerics, so that a stored
value equals a computed one bit for bit. Several processes may use a file at once. Lost or damaged values are measured
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sqlite3
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from buddy.backbone.load import sampled
from buddy.console import errors
from buddy.engine.model import RoutedLM

LAYOUT = 1  # raise it when values are measured differently: older ones are then not found
WRITE_EVERY = 2.0  # seconds: the most that a kill loses
BUSY_TIMEOUT = 20.0  # seconds to wait for another process that writes
DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_IOERR_SHORT_READ}
TABLE = "CREATE TABLE IF NOT EXISTS measured (key TEXT PRIMARY KEY, value BLOB, sum INTEGER) WITHOUT ROWID"
T = TypeVar("T")


class Measurements:
    """Tensors by key, in memory and, if a folder is given, in an SQLite file; a stored value keeps every bit.

    A damaged file is renamed and a new one begun. If the folder cannot be used, values stay in memory. Both are
    reported once on the error stream.

    Args:
        folder: holds the files; the first write creates it. None keeps values in memory only.
        setting: names and values of all that the measurements depend on; another setting is another file.
    """

    def __init__(self, folder: Path | None = None, setting: Mapping[str, Any] | None = None) -> None:
        named = {name: str(value) for name, value in (setting or {}).items()}
        digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
        self.path = None if folder is None else folder / f"{digest[:20]}.sqlite"
        self._usable, self._checked = self.path is not None, False
        self._values: dict[str, Tensor] = {}
        self._unsaved: dict[str, Tensor] = {}
        self._saved_at = time.monotonic()

    def missing(self, keys: Collection[str]) -> list[str]:
        """Those keys that were not measured yet, in their order."""
        absent = [key for key in keys if key not in self._values]
        if absent and self._usable and os.path.exists(self.path):
            self._values |= self._attempt(lambda: self._read(absent)) or {}
        return [key for key in absent if key not in self._values]

    def __getitem__(self, key: str) -> Tensor:
        return self._values[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._values[key] = self._unsaved[key] = value
        if time.monotonic() - self._saved_at >= WRITE_EVERY:
            self.save()

    def save(self) -> None:
        """Write all values that are not on disk yet, all or none."""
        if self._unsaved and self._usable:
            self._attempt(self._write)
        self._unsaved, self._saved_at = {}, time.monotonic()

    def _read(self, keys: Collection[str]) -> dict[str, Tensor]:
        with self._open() as file:
            rows = {
                key: file.execute("SELECT value, sum FROM measured WHERE key = ?", (key,)).fetchone() for key in keys
            }
        return {key: _decode(key, *row) for key, row in rows.items() if row is not None}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {key: save({"": value}) for key, value in self._unsaved.items()}
        rows = [(key, value, _sum(key, value)) for key, value in values.items()]
        with self._open() as file, file:
            file.executemany("INSERT OR REPLACE INTO measured VALUES (?, ?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one call, so that forked processes share none; the first call checks the file."""
        with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT)) as file:
            if not self._checked:
                file.execute(TABLE)
                if file.execute("PRAGMA quick_check").fetchone() != ("ok",):
                    raise _DamagedRow
                self._checked = True
            yield file

    def _attempt(self, action: Callable[[], T]) -> T | None:
        """The action's result, of a second attempt if the file was damaged; None if the file cannot be used."""
        try:
            try:
                return action()
            except sqlite3.DatabaseError as error:
                code = getattr(error, "sqlite_errorcode", 0)
                if not DAMAGE & {code, code & 0xFF}:  # an extended code has the primary one in its lowest byte
                    raise
            self._rename_damaged()
            return action()
        except (sqlite3.Error, OSError) as error:
            self._usable = False
            errors.print(
                f"Measured values cannot be stored in {self.path.parent} ({error}), so an interrupted search would "
                "start again; set BUDDY_CALIBRATION_CACHE to a folder that can be written.",
                soft_wrap=True,
            )
            return None

    def _rename_damaged(self) -> None:
        damaged = self.path.with_suffix(".damaged")
        self._checked = False
        with suppress(FileNotFoundError):  # another process was faster
            self.path.replace(damaged)
            errors.print(
                f"The file of measured values {self.path} is damaged; it is renamed {damaged.name}, and its values "
                "are measured again.",
                soft_wrap=True,
            )


def measurement_setting(routed: RoutedLM, windows: Tensor, batch_size: int) -> dict[str, Any]:
    """All that measured values depend on to the last bit; equal in every process.

    The rounding of a sum depends on the size of a batch, the number of threads and the processor's instructions too.

    Args:
        routed: the model.
        windows: (N, W) long.
        batch_size: windows per forward.
    """
    backbone = routed.backbone
    config = backbone.model.config
    described = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {
        "layout": LAYOUT,
        "backbone": backbone.fingerprint,
        "configuration": _digest(json.dumps(described, sort_keys=True, default=str).encode()),
        "weights": _digest(*(_bytes(sampled(parameter)) for parameter in backbone.model.parameters())),
        "dtype": backbone.dtype,
        "attention": config._attn_implementation,
        "device": _device(backbone.device),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "windows": _digest(_bytes(windows)),
        "shape": tuple(windows.shape),
        "batch_size": batch_size,
        "sink_tokens": routed.sink_tokens,
        "context_layer": routed.geometry.context_layer,
    }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


class _DamagedRow(sqlite3.DatabaseError):
    """A row whose checksum is wrong."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def _sum(key: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key.encode()))


def _decode(key: str, value: Any, total: Any) -> Tensor:
    """The tensor in a row; _DamagedRow if its checksum is wrong."""
    try:
        if _sum(key, value) == total:
            return load(value)[""]
    except (TypeError, SafetensorError, KeyError):
        pass
    raise _DamagedRow
