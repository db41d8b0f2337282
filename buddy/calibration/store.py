"""Measured values of a calibration: in memory, and in SQLite so that a search that was interrupted resumes.

One SQLite file holds what was measured under one setting: the same weights, windows and numerics, so that a stored
value is bit for bit the one that would be computed. Several processes may use a file at once. Nothing here is needed:
what is lost or damaged is measured again.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sqlite3
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from buddy.console import errors
from buddy.engine.model import RoutedLM

LAYOUT = 1  # raise it when values are measured in another way: older ones are then not found
SAMPLE = 1024  # values of each parameter that stand for all of them
WRITE_EVERY = 2.0  # seconds: what a kill may cost
BUSY_TIMEOUT = 20.0  # seconds to wait for another process that writes
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_IOERR_SHORT_READ)
TABLES = """
CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS measured (key TEXT PRIMARY KEY, value BLOB, sum INTEGER) WITHOUT ROWID;
"""
T = TypeVar("T")


class Measurements:
    """Tensors by key, in memory and, where a folder is given, in an SQLite file; a value comes back bit for bit.

    A damaged file is set aside and a new one begun; a folder that cannot be used is used no more. Both are reported
    once on the error stream.

    Args:
        folder: of the files; made by the first write. None keeps values in memory only.
        setting: names and values of all that the measurements depend on; another setting is another file.
    """

    def __init__(self, folder: Path | None = None, setting: Mapping[str, Any] | None = None) -> None:
        self._setting = {name: str(value) for name, value in (setting or {}).items()}
        digest = hashlib.sha256(json.dumps(self._setting, sort_keys=True).encode()).hexdigest()
        self.path = None if folder is None else folder / f"{digest[:20]}.sqlite"
        self._readable = self._writable = self.path is not None
        self._checked = False
        self._values: dict[str, Tensor] = {}
        self._unsaved: dict[str, Tensor] = {}
        self._saved_at = time.monotonic()

    def missing(self, keys: Collection[str]) -> list[str]:
        """Those keys that were not measured yet, in their order."""
        absent = [key for key in keys if key not in self._values]
        if absent and self._readable and self.path.exists():
            stored = self._attempt(lambda: self._read(absent))
            self._readable = stored is not None
            self._values |= stored or {}
        return [key for key in absent if key not in self._values]

    def __getitem__(self, key: str) -> Tensor:
        return self._values[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._values[key] = self._unsaved[key] = value
        if time.monotonic() - self._saved_at >= WRITE_EVERY:
            self.save()

    def save(self) -> None:
        """Write all values that are not on disk yet; while another process blocks the file, they wait for the next."""
        if self._unsaved and self._writable:
            done = self._attempt(self._write)
            self._writable = done is not None
            if done is False:
                return
        self._unsaved, self._saved_at = {}, time.monotonic()

    def _read(self, keys: Collection[str]) -> dict[str, Tensor]:
        stored = {}
        with self._open() as file:
            for key in keys:
                row = file.execute("SELECT value, sum FROM measured WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    stored[key] = _decode(key, *row)
        return stored

    def _write(self) -> bool:
        """Write the unsaved values, all or none; False where the file was busy all the time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [(key, value, _sum(key, value)) for key, value in ((k, save({"": v})) for k, v in self._unsaved.items())]
        with self._open() as file:
            try:
                file.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                    return False
                raise
            file.executemany("INSERT OR IGNORE INTO setting VALUES (?, ?)", self._setting.items())
            file.executemany("INSERT OR REPLACE INTO measured VALUES (?, ?, ?)", rows)
            file.execute("COMMIT")
        return True

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection for one call, so that forked processes share none; the file's structure is checked once."""
        with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT, isolation_level=None)) as file:
            if not self._checked:
                file.executescript(TABLES)
                if file.execute("PRAGMA quick_check").fetchone() != ("ok",):
                    raise _Damaged
                self._checked = True
            yield file

    def _attempt(self, action: Callable[[], T]) -> T | None:
        """The action's result, of a second try where the file was damaged; None where the disk cannot be used."""
        try:
            try:
                return action()
            except (sqlite3.DatabaseError, _Damaged) as error:
                if not _is_damage(error):
                    raise
            self._set_aside()
            return action()
        except (sqlite3.Error, OSError, _Damaged) as error:
            errors.print(
                f"Measured values cannot be stored in {self.path.parent} ({error}), so an interrupted search would "
                "start again; set BUDDY_CALIBRATION_CACHE to a folder that can be written.",
                soft_wrap=True,
            )
            return None

    def _set_aside(self) -> None:
        aside = self.path.with_suffix(".damaged")
        self._checked = False
        try:
            self.path.replace(aside)
        except FileNotFoundError:  # another process was faster
            return
        errors.print(
            f"The file of measured values {self.path} is damaged; it is renamed {aside.name}, and they are measured "
            "again.",
            soft_wrap=True,
        )


def setting_of(routed: RoutedLM, windows: Tensor, batch_size: int) -> dict[str, Any]:
    """All that measured values depend on to the last bit, by name; the same in every process.

    The rounding of a sum depends on the size of a batch, the number of threads and the machine's instructions, so they
    are here too.

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
        "weights": _digest(*(_bytes(_sample(parameter)) for parameter in backbone.model.parameters())),
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


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


class _Damaged(Exception):
    """A file that can be opened but does not hold what was written."""


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None) or 0
    return isinstance(error, _Damaged) or code in DAMAGE or code & 0xFF in DAMAGE


def _sum(key: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key.encode()))


def _decode(key: Any, value: Any, total: Any) -> Tensor:
    """The tensor in a row; _Damaged where the row is not what was written."""
    if not (isinstance(key, str) and isinstance(value, bytes)) or _sum(key, value) != total:
        raise _Damaged
    try:
        return load(value)[""]
    except (SafetensorError, KeyError) as error:
        raise _Damaged from error
