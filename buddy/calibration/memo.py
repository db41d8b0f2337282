"""What was measured so far, in memory and, where there is a store, on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from torch import Tensor

from buddy.calibration.store import Store

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
