"""Stopping in good order, and keeping Lightning's chatter from the terminal."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from buddy.progress import errors


class StopOnSignal(Callback):
    """Ctrl-C or SIGTERM: finish the step, save a checkpoint, stop. A second one stops at once.

    Args:
        path: where the checkpoint goes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.asked = path, False
        self._before: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.asked:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.asked:
            trainer.save_checkpoint(self.path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        errors.print("Stopping after this step …")


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without its advice: what devices there are, how many workers to use, tips."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", module="lightning", message=".*(num_workers|logging interval|Checkpoint directory).*"
        )
        warnings.filterwarnings("ignore", message=".*treespec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        try:
            yield
        finally:
            logger.setLevel(level)
