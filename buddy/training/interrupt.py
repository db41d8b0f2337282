"""Stopping in good order, and keeping Lightning's chatter from the terminal."""

from __future__ import annotations

import logging
import os
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
from lightning.pytorch.plugins.io import TorchCheckpointIO

from buddy.progress import errors

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Keeper(Callback):
    """Saves a checkpoint now and then, after the last step, and after Ctrl-C or SIGTERM, which stop after the step.

    A second signal stops at once.

    Args:
        path: where the newest checkpoint is kept.
        every: steps from one to the next.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every, self.asked = path, every, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are taken within this block.

        Raises:
            KeyboardInterrupt: a second signal came.
        """
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self._listen()
        try:
            yield
        except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt
            raise KeyboardInterrupt if self.asked else error from None
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()  # again, since Lightning has put a handler of its own for SIGTERM in place

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.asked = trainer.strategy.reduce_boolean_decision(self.asked, all=False)  # every process or none
        trainer.should_stop = trainer.should_stop or self.asked
        if trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)

    def _listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        errors.print("Stopping after this step …")


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a kill leaves the old one or the new one.

    Lightning's own writes to the system's temporary folder first; from another disk that is a copy, which can be cut.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        path = Path(path)
        beside = path.with_name(f".{path.name}.part")
        super().save_checkpoint(checkpoint, beside, storage_options)
        os.replace(beside, path)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without its advice: what devices there are, how many workers to use, tips."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning", message=".*(num_workers|logging interval).*")
        warnings.filterwarnings("ignore", message=".*treespec.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
