"""The LightningModule that trains adapter and bridges under a router's plans, which is frozen or trained too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from buddy.engine.model import RoutedLM
from buddy.losses import DenseDistribution, Objective
from buddy.router import LayerwiseRouter
from buddy.training.estimators import Estimator, TrainingBatch
from buddy.training.module import BudgetModule


class HealingModule(BudgetModule):
    """Trains adapter, bridges or both by back-propagation through the layers that plans run; the plans are given.

    Every row has a budget of its own, so that one adapter serves all; full depth is among the draws of an adapter
    wherever it is among the budgets (2606.09514, section 4), which keeps the adapted model near the stock one there.
    Bridges alone leave full depth as it is, so it is not drawn. KL is to the stock model, the adapter off. Dropout
    is the one draw that each process makes for itself.

    Args:
        model: backbone, calibrated or trained router, and adapter or bridges or both.
        budgets: fractions of the layers, or other budgets such as "22layers".
        objective: judges outputs; KL to the stock model by default.
        estimator: turns plans into a loss for the router, which is trained in the same steps; None leaves it as it is.
        router_lr: learning rate of the router, which its parameter groups multiply by their scales.
        bridge_lr: learning rate of the bridges; 0 leaves them as they are.
        options: prompt, lr, warmup_steps, weight_decay, seed and reference of `BudgetModule`. Trainings of several
            routers on the same windows share the dense model's results through one reference.
    """

    prefix, activity = "heal", "Healing"
    advice = "lower adapter.lr or bridge.lr (`buddy fit` keeps a trained router by ckpt_path=RUN/checkpoints/last.ckpt)"

    def __init__(
        self,
        model: RoutedLM,
        *,
        budgets: Sequence[float | str],
        objective: Objective | None = None,
        estimator: Estimator | None = None,
        router_lr: float = 0.0,
        bridge_lr: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, budgets=budgets, **options)
        self.parts = None if model.adapter is None else model.adapter.parts
        self.router = model.router if estimator else None
        self.bridges = model.bridges.trainable() if bridge_lr and model.bridges is not None else None
        self.objective, self.estimator = objective or Objective(), estimator
        self.router_lr, self.bridge_lr = router_lr, bridge_lr

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Adapter, trained bridges, and the router's own groups where it is trained too."""
        router = self.router.parameter_groups() if self.estimator else []
        rates = [(group["params"], self.router_lr * group.get("scale", 1.0)) for group in router]
        if self.bridges is not None:
            rates.insert(0, (list(self.bridges.parameters()), self.bridge_lr))
        if self.parts is not None:
            rates.insert(0, (list(self.model.adapter.parameters()), self.lr))
        return rates

    @torch.random.fork_rng(devices=[])  # as in `RoutingModule`
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on windows (B, T)."""
        prepared, generator = self._batch(batch, batch_idx, self.below if self.parts is None else self.grid)
        loss, value = self._joint(prepared, generator) if self.estimator else self._healing(prepared)
        self._require_finite("loss", loss.detach(), value)
        self._log(value, prepared.executed, batch_idx)
        return self._step_loss(loss, value)

    def _healing(
        self, batch: TrainingBatch, runs: Tensor | None = None, dense: DenseDistribution | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of the adapter, and the objective (B,) of each row; under the router's plans, or those given."""
        ids, scored, model = batch.input_ids, batch.scored, self.model
        if dense is None and self.objective.kl:
            with model.stock():
                dense = DenseDistribution(self._reference.dense(model.backbone, ids, scored))
        asked = {"executed": batch.executed} if runs is None else {"runs": runs}
        with model.changed(batch_plan="row"):  # the rows of a training batch have nothing in common
            logits = model(ids, **asked, prompt=batch.prompt, logits_to_keep=scored).logits
        value = self.objective(dense, logits, ids[:, scored + 1]).mean(1)
        return value.mean(), value.detach()

    def _joint(self, batch: TrainingBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same with the router's own loss, where the estimator's does not reach the adapter by itself."""
        estimate = self.estimator(self.model, batch, generator)
        if getattr(self.estimator, "backpropagates", False):
            if not isinstance(self.router, LayerwiseRouter):
                return estimate.loss, estimate.objective
            layers = self.model.geometry.layers
            full = batch.executed == layers  # no gate decides there, and the adapter learns alone
            _, below = batch.rows_below(layers)
            own = estimate.loss * (below / len(batch.whole))
            if not full.any():
                return own, estimate.objective
            loss, value = self._healing(replace(batch, input_ids=batch.input_ids[full], executed=batch.executed[full]))
            return own + loss * full.float().mean(), estimate.objective.masked_scatter(full, value)
        loss, value = self._healing(batch, estimate.runs, estimate.dense)
        return loss + estimate.loss, value

    @torch.no_grad()
    def _log(self, value: Tensor, executed: Tensor, batch_idx: int) -> None:
        """Objective, its mean per budget since the last log, over all processes."""
        self.log("heal/objective", value.mean(), sync_dist=True)
        self._log_means(value, executed, batch_idx)
