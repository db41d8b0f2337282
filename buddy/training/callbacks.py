"""Stopping in good order, checkpoints that are whole, and the progress of a training on one line."""

from __future__ import annotations

import io
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from buddy.console import Bar, errors
from buddy.io import write_bytes, writing
from buddy.run import Stopwatch

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Keeper(Callback):
    """Saves a checkpoint now and then, after the last step, and after Ctrl-C or SIGTERM, which stop after the step.

    A second signal stops at once.

    Args:
        path: where the newest checkpoint is kept.
        every: steps from one to the next.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every, self.asked, self.began = path, every, False, False

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
        self.began = True
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

    Lightning's own writes to the system's temporary folder first; from another disk that is a copy, which can be cut,
    and a kill leaves it there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Raises RunError where the place cannot be written."""
        path, content = Path(path), io.BytesIO()
        torch.save(checkpoint, content)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getbuffer())


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
        warnings.filterwarnings("ignore", message="FSDP2-wrapped .* view")  # true, and nobody writes into it
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


class TrainingBar(Callback):
    """Steps done, time so far, time left and the objective of the last step.

    Args:
        words: what is trained.
        metric: under which the objective is logged.
    """

    def __init__(self, words: str, metric: str = "train/objective") -> None:
        self._words, self._metric, self._note = words, metric, ""
        self._bar: Bar | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._bar = Bar(self._words, trainer.max_steps, trainer.global_step).__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        objective = trainer.callback_metrics.get(self._metric)
        if objective is not None:
            self._note = f"objective {objective:.3f}"
        if self._bar:
            self._bar.update(trainer.global_step, self._note)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.__exit__()
            self._bar = None


class SaveSeconds(Callback):
    """Saves the time spent on a run now and then while training goes on.

    Args:
        stopwatch: of the run.
    """

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            self._stopwatch.tick()
