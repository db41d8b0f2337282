"""The LightningModule that trains a router against a frozen backbone."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from buddy.engine.model import RoutedLM
from buddy.errors import TrainingError
from buddy.losses import draw_budgets
from buddy.router import Context
from buddy.training.estimators import Batch, Estimate, Estimator

WARM = 16  # positions of a window whose prefix is too short to learn from


class NotFinite(TrainingError):
    """A step that would have spoilt the router; it was not taken."""


class RoutingModule(LightningModule):
    """Trains the router of a `RoutedLM`; the backbone is hosted, frozen, and never saved.

    Everything random comes from the seed, the step and a window's place in the batch: a resumed run repeats an
    uninterrupted one bit for bit, and processes that share a batch draw what one alone would draw for it.

    Args:
        routed: backbone and calibrated router.
        estimator: turns windows and budgets into a loss for the router.
        grid: executed layers of the recipe's budgets. Full depth is not drawn where there is another: all plans are
            the same there, and nothing could be learned.
        prompt: tokens of each window that are read, not scored, where the prompt shares a plan.
        lr, warmup_steps, weight_decay, clip: AdamW with linear warm-up, then cosine to a tenth; largest gradient.
        seed: of budgets and perturbations.
    """

    def __init__(
        self,
        routed: RoutedLM,
        estimator: Estimator,
        grid: list[int],
        *,
        prompt: int,
        lr: float,
        warmup_steps: int,
        weight_decay: float,
        clip: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # the backbone is in no checkpoint; `on_load_checkpoint` is strict for the rest
        self._routed = (routed,)  # in a tuple, so that the backbone stays out of this module's state and modes
        self.router = routed.router
        self.start = copy.deepcopy(routed.router).requires_grad_(False)
        below = sorted({k for k in grid if k < routed.geometry.layers})
        self.estimator, self.grid, self.prompt, self.seed = estimator, below or grid, prompt, seed
        self.settings = {"lr": lr, "warmup_steps": warmup_steps, "weight_decay": weight_decay, "clip": clip}
        self.means = nn.ModuleDict({str(k): MeanMetric(nan_strategy="error") for k in below})

    @property
    def routed(self) -> RoutedLM:
        """The model under training."""
        return self._routed[0]

    def on_fit_start(self) -> None:
        """Move the backbone, which Lightning does not know, to the device of the router."""
        self.routed.backbone.model.to(self.device)

    def training_step(self, input_ids: Tensor, _: int) -> Tensor:
        """One step on windows (B, T)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step * 1_009)
        rank, processes = self.global_rank, self.trainer.world_size
        everyone = draw_budgets(self.grid, len(input_ids) * processes, generator)
        executed = everyone[rank::processes].to(input_ids.device)
        estimate = self.estimator(self.routed, self._batch(input_ids, executed, everyone, rank), generator)
        self._require_finite("loss", estimate.loss.detach(), estimate.objective)
        self._log(estimate, executed)
        return estimate.loss

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip by norm, log the norm, and stop before a step that would spoil the router."""
        largest = self.settings["clip"] or math.inf
        norm = nn.utils.clip_grad_norm_(self.router.parameters(), largest)
        self._require_finite("gradient", norm)
        self.log("train/gradient_norm", norm)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the router's own parameter groups; warm-up, then cosine to a tenth."""
        groups = [
            {"params": group["params"], "lr": self.settings["lr"] * group["scale"]}
            for group in self.router.parameter_groups()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.settings["weight_decay"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another router, which `strict_loading = False` would let pass."""
        held, given = self.state_dict(), checkpoint["state_dict"]
        wrong = sorted({*held} ^ {*given} | {k for k in {*held} & {*given} if held[k].shape != given[k].shape})
        if wrong:
            raise TrainingError(
                f"The checkpoint is of another router (it differs in {', '.join(wrong[:3])}); give trainer.ckpt_path a "
                "checkpoint of this recipe, or leave it out."
            )
        self._keep_rates(checkpoint)

    def _keep_rates(self, checkpoint: dict[str, Any]) -> None:
        """The recipe's rates hold, not those saved with the optimizer; where they are the same, nothing changes."""
        scheduler, groups = checkpoint["lr_schedulers"][0], checkpoint["optimizer_states"][0]["param_groups"]
        scheduler["base_lrs"] = [self.settings["lr"] * group["scale"] for group in self.router.parameter_groups()]
        factor = self._factor(scheduler["last_epoch"])
        for group, rate in zip(groups, scheduler["base_lrs"], strict=True):
            group |= {"initial_lr": rate, "lr": rate * factor, "weight_decay": self.settings["weight_decay"]}

    def _batch(self, input_ids: Tensor, executed: Tensor, everyone: Tensor, rank: int) -> Batch:
        first = self.prompt - 1 if self.routed.prompt_plan == "shared" else min(self.prompt - 1, WARM)
        scored = torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device)
        return Batch(input_ids, executed, scored, self.prompt, everyone, rank)

    def _factor(self, step: int) -> float:
        warmup, total = self.settings["warmup_steps"], max(self.trainer.max_steps, 1)
        return min(1.0, (step + 1) / (warmup + 1)) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(step / total, 1.0))))

    @torch.no_grad()
    def _log(self, estimate: Estimate, executed: Tensor) -> None:
        """Objective, its mean per budget since the last log, and how far plans moved: from the start and by token.

        All of it over all processes, which are together here: either every row has a budget below full depth, or none.
        """
        free = executed < self.routed.geometry.layers
        for k, mean in self.means.items():
            mean.update(estimate.objective, (executed == int(k)).float())
        if free.any():
            self.log("train/objective", estimate.objective[free].mean(), sync_dist=True)
        if (self.global_step + 1) % self.trainer.log_every_n_steps:
            return
        for k, mean in self.means.items():
            value = mean.compute()
            if not value.isnan():  # drawn for no row
                self.log(f"train/objective_{k}_layers", value)
            mean.reset()
        if free.any():
            runs = estimate.runs[free]
            changed = (runs[:, 1:] != runs[:, :-1]).any(-1).float().mean()
            self.log("train/changed_plans", changed, sync_dist=True)
            if estimate.context is not None:  # the plans of a layerwise router need a forward of their own
                start = self._start_runs(estimate.context, executed)[free]
                moved = torch.stack([(runs & ~start).sum(), runs.sum()]).float()
                moved, ran = self.trainer.strategy.reduce(moved, reduce_op="sum")
                self.log("train/moved_layers", moved / ran)

    def _start_runs(self, context: Context, executed: Tensor) -> Tensor:
        """(B, T, L) bool: the plans before training."""
        return self.routed.plan(self.start.score(context), executed, self.prompt)

    def _require_finite(self, what: str, *values: Tensor) -> None:
        wrong = not all(bool(value.isfinite().all()) for value in values)
        if self.trainer.strategy.reduce_boolean_decision(wrong, all=False):  # in one process, and all must stop
            raise NotFinite(
                f"Training stopped at step {self.global_step + 1} because the {what} is not finite; lower optimizer.lr "
                "or objective.sigma"
            )
