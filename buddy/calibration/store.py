"""Measured values of a calibration: in memory, and on disk so that a search that was stopped resumes."""

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
from transformers import PreTrainedConfig

from buddy.backbone.embedded import cache_root
from buddy.console import errors
from buddy.engine.model import RoutedLM

PLACE = "BUDDY_CALIBRATION_CACHE"
PATIENCE = 20.0  # seconds to wait for another process that writes
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_IOERR_SHORT_READ)
TABLES = """
CREATE TABLE IF NOT EXISTS setting (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS measured (key TEXT PRIMARY KEY, value BLOB, sum INTEGER) WITHOUT ROWID;
"""
T = TypeVar("T")


def cache_folder() -> Path | None:
    """Where measured values are kept: BUDDY_CALIBRATION_CACHE, nowhere if that is empty, else in the model cache."""
    place = os.environ.get(PLACE)
    if place is None:
        return cache_root() / "calibration"
    return Path(place).expanduser().absolute() if place else None


class Store:
    """A file of named tensors for one setting.

    A damaged file is set aside and begun anew; where the folder cannot be used, nothing is kept. Both are said once on
    the error stream.

    Args:
        folder: where files are kept; made on the first write.
        setting: all that the values depend on; another setting is another file.
    """

    def __init__(self, folder: Path, setting: Mapping[str, Any]) -> None:
        self._setting = {name: str(value) for name, value in setting.items()}
        digest = hashlib.sha256(json.dumps(self._setting, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{digest[:20]}.sqlite"
        self._readable = self._writable = True
        self._checked = False

    def read(self, keys: Collection[str]) -> dict[str, Tensor]:
        """The values of those keys that are there."""
        if not self._readable or not self.path.exists():
            return {}
        found = self._safely(lambda: self._read(keys))
        self._readable = found is not None
        return found or {}

    def write(self, values: Mapping[str, Tensor]) -> bool:
        """Keep values, all or none; False where another process was in the way all the time, to try again later."""
        if not self._writable:
            return True
        done = self._safely(lambda: self._write(values))
        self._writable = done is not None
        return done is not False

    def _read(self, keys: Collection[str]) -> dict[str, Tensor]:
        found = {}
        with self._open() as file:
            for key in keys:
                row = file.execute("SELECT value, sum FROM measured WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = _decoded(key, *row)
        return found

    def _write(self, values: Mapping[str, Tensor]) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [(key, value, _sum(key, value)) for key, value in ((k, save({"": v})) for k, v in values.items())]
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
        """The file, made if it is missing, looked through once; a connection lives for one call, so forks are safe."""
        with closing(sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None)) as file:
            if not self._checked:
                file.executescript(TABLES)
                if file.execute("PRAGMA quick_check").fetchone() != ("ok",):
                    raise _Damage
                self._checked = True
            yield file

    def _safely(self, act: Callable[[], T]) -> T | None:
        """The act's result, repeated once where damage had to be mended; None, and a sentence, where it is no use."""
        try:
            try:
                return act()
            except (sqlite3.DatabaseError, _Damage) as error:
                if not _is_damage(error):
                    raise
            self._set_aside()
            return act()
        except (sqlite3.Error, OSError, _Damage) as error:
            errors.print(
                f"What is measured cannot be kept in {self.path.parent} ({error}), so a search that is stopped would "
                f"begin anew; set {PLACE} to a folder that can be written.",
                soft_wrap=True,
            )
            return None

    def _set_aside(self) -> None:
        """Rename the damaged file, unless another process did so before."""
        from filelock import FileLock

        self._checked = False
        with FileLock(self.path.with_suffix(".lock")):
            with suppress(sqlite3.DatabaseError, _Damage), self._open() as file:
                for key, value, total in file.execute("SELECT key, value, sum FROM measured"):
                    _decoded(key, value, total)
                return
            aside = self.path.with_suffix(".damaged")
            self.path.replace(aside)
            self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
            self._checked = False
        errors.print(
            f"The file of measured values {self.path} is damaged; it is kept as {aside.name}, and they are measured "
            "anew.",
            soft_wrap=True,
        )


class _Damage(Exception):
    """A file that can be opened but does not hold what was written."""


def _is_damage(error: Exception) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, _Damage) or code in DAMAGED or (code or 0) & 0xFF in DAMAGED


def _sum(key: str, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key.encode()))


def _decoded(key: Any, value: Any, total: Any) -> Tensor:
    """The tensor in a row.

    Raises:
        _Damage: the row is not what was written.
    """
    if not (isinstance(key, str) and isinstance(value, bytes)) or _sum(key, value) != total:
        raise _Damage
    try:
        return load(value)[""]
    except (SafetensorError, KeyError) as error:
        raise _Damage from error


LAYOUT = 1  # raise it when values are measured in another way: older ones are then not found
SAMPLE = 1024  # values of each parameter that stand for all of them


def setting_of(routed: RoutedLM, windows: Tensor, batch_size: int) -> dict[str, Any]:
    """Names and values, the same in another process that would measure the same numbers.

    The rounding of a sum depends on the size of a batch, the number of threads and the machine's instructions, so they
    are here too.

    Args:
        routed: the model.
        windows: (N, W) long.
        batch_size: windows per forward.
    """
    backbone = routed.backbone
    return {
        "layout": LAYOUT,
        "backbone": backbone.fingerprint,
        "configuration": _configuration(backbone.model.config),
        "weights": _digest(*(_sample(parameter) for parameter in backbone.model.parameters())),
        "dtype": backbone.dtype,
        "attention": backbone.model.config._attn_implementation,
        "device": _device(backbone.device),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "windows": _digest(windows.cpu()),
        "shape": tuple(windows.shape),
        "batch_size": batch_size,
        "sink_tokens": routed.sink_tokens,
        "context_layer": routed.geometry.context_layer,
    }


def _configuration(config: PreTrainedConfig) -> str:
    """A digest of all that a model's configuration says but where it came from."""
    said = config.to_dict()
    for origin in ("_name_or_path", "transformers_version"):
        said.pop(origin, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)].cpu()


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


WRITE_EVERY = 2.0  # seconds: what a kill may cost


class Memo:
    """Tensors by name. A value is given back exactly as it was, whether it comes from memory or from disk.

    Args:
        store: makes the store when it is first needed; None keeps everything in memory only.
    """

    def __init__(self, store: Callable[[], Store] | None = None) -> None:
        self._make = store
        self._store: Store | None = None
        self._values: dict[str, Tensor] = {}
        self._unsaved: dict[str, Tensor] = {}
        self._saved_at = time.monotonic()

    def missing(self, keys: Collection[str]) -> list[str]:
        """Those keys that were not measured yet, in their order."""
        absent = [key for key in keys if key not in self._values]
        store = self._open()
        if absent and store is not None:
            self._values |= store.read(absent)
        return [key for key in absent if key not in self._values]

    def __getitem__(self, key: str) -> Tensor:
        return self._values[key]

    def __setitem__(self, key: str, value: Tensor) -> None:
        self._values[key] = self._unsaved[key] = value
        if time.monotonic() - self._saved_at >= WRITE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what is not on disk yet; what cannot be written now is tried again."""
        store = self._open()
        if self._unsaved and (store is None or store.write(self._unsaved)):
            self._unsaved = {}
        self._saved_at = time.monotonic()

    def _open(self) -> Store | None:
        if self._store is None and self._make is not None:
            self._store = self._make()
        return self._store
