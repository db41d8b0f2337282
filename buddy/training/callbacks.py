"""Lightning callbacks and plugins: stopping after a step, checkpoints that are never half-written, a progress line."""

from __future__ import annotations

import io
import os
import signal
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from buddy.console import Bar, stderr
from buddy.errors import TrainingError
from buddy.io import write_bytes, writing

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NEEDED = ("state_dict", "global_step", "loops", "optimizer_states", "lr_schedulers")  # in a checkpoint


class LastCheckpoint(Checkpoint):
    """Keeps one checkpoint up to date: every so many steps, when the training ends, and when it is stopped.

    Ctrl-C and SIGTERM stop the training after the step, in all processes; a second signal stops at once.

    If a validation follows a step, saving and stopping wait until it is done: a resumed training does not repeat the
    validation, and callbacks that monitor it would miss it. At the end of an epoch they wait for the next step, since
    Lightning would resume without the results that callbacks look for there. Callbacks that may end the training, too,
    stand before this one.

    Args:
        path: the checkpoint's file.
        every: steps from one save to the next.

    Attributes:
        requested: whether a signal came, to this process or to another of the run.
        stopped: whether it was a signal that ended the training.
        began: whether training was reached.
    """

    def __init__(self, path: Path, every: int) -> None:
        self._path, self._every = path, every
        self.requested = self.stopped = self.began = self._ended = self._due = False
        self._saved = 0  # the step of the last save, or the one that training starts from

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began, self._saved = True, trainer.global_step
        # Lightning has put handlers of its own in place by now, and will put back those before them.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._request)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._due |= trainer.global_step % self._every == 0 and trainer.global_step != self._saved
        if not trainer.fit_loop.epoch_loop._should_accumulate() and not _validates_now(trainer):  # not amid a step
            self._stop(trainer)
            if self.stopped:
                trainer.limit_val_batches = 0  # otherwise Lightning would validate once more
            self._save(trainer, self._due)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop
        if trainer.state.fn == TrainerFn.FITTING and not loop._num_ready_batches_reached():
            if self.began and not trainer.should_stop and not loop._should_accumulate():
                self._stop(trainer)
            self._ended = trainer.should_stop and not self.stopped and trainer.fit_loop._can_stop_early
            self._save(trainer, self._due)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = not self.stopped
        self._save(trainer, self._ended or self._saved != trainer.global_step)

    def _save(self, trainer: Trainer, wanted: bool) -> None:
        if wanted:
            trainer.save_checkpoint(self._path)
            self._saved, self._due = trainer.global_step, False

    def _stop(self, trainer: Trainer) -> None:
        self.requested = trainer.strategy.reduce_boolean_decision(self.requested, all=False)  # every process or none
        if self.requested:
            trainer.should_stop = self.stopped = True

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        stderr.print("Stopping after this step …")

    def state_dict(self) -> dict[str, Any]:
        return {"ended": self._ended}


def _validates_now(trainer: Trainer) -> bool:
    """At the end of a training batch, whether a validation follows before the next one."""
    loop = trainer.fit_loop
    return bool(trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


@contextmanager
def interrupts(trainer: Trainer) -> Iterator[None]:
    """Within this block Ctrl-C and SIGTERM raise KeyboardInterrupt; a trainer would end the process, or go on."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error, SIGTERMException) or isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if trainer.received_sigterm:
        raise KeyboardInterrupt


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under another name and renames it, so that a kill leaves the old one or the new one whole.

    Lightning's own writes to the system's temporary folder first; from another disk that is a copy, which can be cut,
    and a kill leaves it there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Raises RunError where the path cannot be written."""
        path, content = Path(path), io.BytesIO()
        torch.save(checkpoint, content)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content.getbuffer())


class ProgressLine(Callback):
    """Steps done, time so far, time left and the objective of the last step, on the error stream.

    Where that is no terminal, it is a plain line now and then.

    Args:
        description: label of the line.
        metric: the name under which the objective is logged.
    """

    def __init__(self, description: str, metric: str = "train/objective") -> None:
        self._description, self._metric, self._note = description, metric, ""
        self._bar: Bar | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
        self._open(trainer, total, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        objective = trainer.callback_metrics.get(self._metric)
        if objective is not None:
            self._note = f"objective {objective:.3f}"
        if self._bar:
            self._bar.update(trainer.global_step, self._note)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(trainer, int(sum(trainer.num_test_batches)))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._bar:
            self._bar.update(batch_idx + 1)

    def on_exception(self, *_: Any) -> None:
        if self._bar:
            self._bar.__exit__()
            self._bar = None

    on_train_end = on_test_end = on_exception

    def _open(self, trainer: Trainer, total: int, done: int = 0) -> None:
        if trainer.is_global_zero:
            self._bar = Bar(self._description, total, done).__enter__()


def has_ended(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the training that a `LastCheckpoint` is of took its last step, early or not."""
    states = {key: state for key, state in checkpoint.get("callbacks", {}).items() if key.startswith("LastCheckpoint")}
    return any(state.get("ended") for state in states.values())


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint; what is pickled in it is not run.

    Raises:
        TrainingError: the file is no whole checkpoint of a training.
    """
    content: dict[str, Any] = {}
    if not os.path.isfile(path):
        raise TrainingError(f"There is no checkpoint {path}; leave ckpt_path out or name an existing file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        missing = {*NEEDED} - {*content}
        with zipfile.ZipFile(path) as parts:  # torch itself does not look at the sums
            missing = missing or {name for name in [parts.testzip()] if name}
    except Exception as error:  # cut, overwritten and foreign files show as a dozen kinds of error
        missing = {type(error).__name__}
    if missing:
        raise unusable(path, ", ".join(sorted(missing)))
    return content


def unusable(path: str | Path, reason: str) -> TrainingError:
    """The error for a checkpoint that cannot be resumed from."""
    return TrainingError(
        f"The training cannot resume from {path} ({reason}); name another checkpoint as ckpt_path, or delete it and "
        "start anew."
    )
