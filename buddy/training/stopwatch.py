"""Time spent on a run over all its beginnings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from buddy.errors import BuddyError
from buddy.io import read_json, write_json

EVERY = 5.0  # seconds from one save to the next


class Stopwatch(Callback):
    """Runs from its making; what earlier beginnings of the same run spent is read from a file and added.

    As a callback it saves now and then while training goes on.

    Args:
        path: where the seconds are kept until the run is whole.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._start = path, time.perf_counter()
        self._saved = self._start
        try:
            self._before = float(read_json(path)["seconds"])
        except (BuddyError, KeyError, TypeError, ValueError):  # a first beginning, or a file that cannot be trusted
            self._before = 0.0

    @property
    def seconds(self) -> float:
        """Seconds so far, earlier beginnings included."""
        return self._before + time.perf_counter() - self._start

    def tick(self) -> None:
        """Keep what was spent for the next beginning, if the last time is a while ago."""
        if time.perf_counter() - self._saved >= EVERY:
            self.save()

    def save(self) -> None:
        """Keep what was spent for the next beginning."""
        self._saved = time.perf_counter()
        write_json(self._path, {"seconds": self.seconds})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            self.tick()
