"""The progress of a training run, on one line."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from buddy.console import Bar


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
