"""The LightningModule that trains an adapter under a router's plans, beside a frozen router or together with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from buddy.backbone.adapter import Adapter
from buddy.engine.model import RoutedLM
from buddy.errors import TrainingError
from buddy.losses import Dense, Objective, draw_budgets
from buddy.training.estimators import Batch, Estimator, Perturbed
from buddy.training.module import WARM, NotFinite

IDENTITY = "healing"  # in a checkpoint


@dataclass(frozen=True)
class Together:
    """How the router is trained in the same steps.

    Attributes:
        estimator: turns plans into a loss for the router.
        lr: of the router, times its own factors.
    """

    estimator: Estimator
    lr: float


class HealingModule(LightningModule):
    """Trains the adapter of a `RoutedLM` by back-propagation through the layers that plans run; the plans are given.

    Every row has a budget of its own, so that one adapter serves all; full depth is among the draws wherever it is in
    the grid (2606.09514, section 4), which keeps the adapted model near the stock one there. KL is to the stock model,
    the adapter off. Everything random comes from the seed, the step and a window's place in the batch, so a resumed
    run repeats an uninterrupted one, and processes that share a batch draw what one alone would; all but dropout, which
    each process draws for itself.

    Args:
        routed: backbone, calibrated or trained router, and adapter.
        objective: what outputs are judged by.
        grid: executed layers of the recipe's budgets.
        prompt: tokens of each window that are read, not scored, where the prompt shares a plan.
        lr, warmup_steps, weight_decay, clip: AdamW with linear warm-up, then cosine to a tenth; largest gradient.
        seed: of budgets, dropout and perturbations.
        identity: what a checkpoint must have been made with to be gone on from, in words.
        checkpoint: its path, to be named where it was not.
        together: how the router is trained in the same steps; None leaves it as it is.
    """

    def __init__(
        self,
        routed: RoutedLM,
        objective: Objective,
        grid: list[int],
        *,
        prompt: int,
        lr: float,
        warmup_steps: int,
        weight_decay: float,
        clip: float,
        seed: int,
        identity: Mapping[str, str],
        checkpoint: str = "healing.ckpt",
        together: Together | None = None,
    ) -> None:
        super().__init__()
        self._routed = (routed,)  # in a tuple, so that the backbone stays out of this module's state and modes
        self.parts = routed.adapter.parts
        self.router = routed.router if together else None
        self.objective, self.grid, self.prompt, self.seed = objective, grid, prompt, seed
        self.settings = {"lr": lr, "warmup_steps": warmup_steps, "weight_decay": weight_decay, "clip": clip}
        self.identity, self.checkpoint, self.together = dict(identity), checkpoint, together
        self.means = nn.ModuleDict({str(k): MeanMetric() for k in sorted({*grid})})

    @property
    def routed(self) -> RoutedLM:
        """The model under healing."""
        return self._routed[0]

    @property
    def adapter(self) -> Adapter:
        """What is trained."""
        return self.routed.adapter

    def on_fit_start(self) -> None:
        """Move the backbone, which Lightning does not know, to the device of the adapter."""
        self.routed.backbone.model.to(self.device)
        self.routed.router.to(self.device)

    def training_step(self, input_ids: Tensor, _: int) -> Tensor:
        """One step on windows (B, T)."""
        seed = self.seed * 1_000_003 + self.global_step * 1_009
        rank, processes = self.global_rank, self.trainer.world_size
        torch.manual_seed(seed + rank)  # of dropout, which has no generator of its own
        generator = torch.Generator().manual_seed(seed)
        everyone = draw_budgets(self.grid, len(input_ids) * processes, generator)
        executed = everyone[rank::processes].to(input_ids.device)
        batch = Batch(input_ids, executed, self._scored(input_ids), self.prompt, everyone, rank)
        loss, value = self._together(batch, generator) if self.together else self._healing(batch)
        self._require_finite("loss", loss.detach(), value)
        self._log(value, executed)
        # Where a layer runs for nobody its factors have no gradient, and processes side by side wait for each of them.
        return loss + 0.0 * sum(parameter.sum() for parameter in self._trained())

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip by norm, log the norm, and stop before a step that would spoil the adapter."""
        norm = nn.utils.clip_grad_norm_(self._trained(), self.settings["clip"] or math.inf)
        self._require_finite("gradient", norm)
        self.log("heal/gradient_norm", norm)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the adapter, and over the router's own groups where it is trained too; warm-up, then cosine."""
        groups = [{"params": params, "lr": rate} for params, rate in self._groups()]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.settings["weight_decay"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What it was made with goes along."""
        checkpoint[IDENTITY] = self.identity

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another healing; the recipe's rates hold over those saved with the optimizer."""
        held, given = self.state_dict(), checkpoint["state_dict"]
        wrong = {k for k in {*held} & {*given} if held[k].shape != given[k].shape} | ({*held} ^ {*given})
        made = checkpoint.get(IDENTITY, {})
        differing = [name for name, value in self.identity.items() if made.get(name) != value]
        if wrong or differing:
            raise TrainingError(
                f"The checkpoint {self.checkpoint} is of another healing (it differs in "
                f"{', '.join(differing or sorted(wrong)[:3])}); delete it, and repeat."
            )
        scheduler, groups = checkpoint["lr_schedulers"][0], checkpoint["optimizer_states"][0]["param_groups"]
        scheduler["base_lrs"] = [rate for _, rate in self._groups()]
        factor = self._factor(scheduler["last_epoch"])
        for group, rate in zip(groups, scheduler["base_lrs"], strict=True):
            group |= {"initial_lr": rate, "lr": rate * factor, "weight_decay": self.settings["weight_decay"]}

    def _healing(self, batch: Batch, runs: Tensor | None = None, dense: Dense | None = None) -> tuple[Tensor, Tensor]:
        """The loss of the adapter, and the objective (B,) of each row; under the router's plans, or those given."""
        ids, scored, routed = batch.input_ids, batch.scored, self.routed
        if dense is None and self.objective.kl:
            dense = Dense(routed.dense(ids, logits_to_keep=scored))
        asked = {"executed": batch.executed} if runs is None else {"runs": runs}
        logits = routed(ids, **asked, prompt=batch.prompt, logits_to_keep=scored).logits
        value = self.objective(dense, logits, ids[:, scored + 1]).mean(1)
        return value.mean(), value.detach()

    def _together(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same with the router's own loss, where the estimator's does not reach the adapter by itself."""
        estimate = self.together.estimator(self.routed, batch, generator)
        if not isinstance(self.together.estimator, Perturbed):
            return estimate.loss, estimate.objective
        loss, value = self._healing(batch, estimate.runs, estimate.dense)
        return loss + estimate.loss, value

    def _scored(self, input_ids: Tensor) -> Tensor:
        first = self.prompt - 1 if self.routed.prompt_plan == "shared" else min(self.prompt - 1, WARM)
        return torch.arange(first, input_ids.shape[1] - 1, device=input_ids.device)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for params, _ in self._groups() for parameter in params]

    def _groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters with their rates."""
        router = self.router.parameter_groups() if self.together else []
        rates = [(group["params"], self.together.lr * group["scale"]) for group in router]
        return [(self.adapter.parameters(), self.settings["lr"]), *rates]

    def _factor(self, step: int) -> float:
        warmup, total = self.settings["warmup_steps"], max(self.trainer.max_steps, 1)
        return min(1.0, (step + 1) / (warmup + 1)) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(step / total, 1.0))))

    @torch.no_grad()
    def _log(self, value: Tensor, executed: Tensor) -> None:
        """Objective, its mean per budget since the last log, over all processes; and the rate."""
        for k, mean in self.means.items():
            mean.update(value, (executed == int(k)).float())
        self.log("heal/objective", value.mean(), sync_dist=True)
        if (self.global_step + 1) % self.trainer.log_every_n_steps:
            return
        self.log("heal/lr", self.optimizers().param_groups[0]["lr"])
        for k, mean in self.means.items():
            seen = mean.compute()
            if not seen.isnan():  # drawn for no row
                self.log(f"heal/objective_{k}_layers", seen)
            mean.reset()

    def _require_finite(self, what: str, *values: Tensor) -> None:
        wrong = not all(bool(value.isfinite().all()) for value in values)
        if self.trainer.strategy.reduce_boolean_decision(wrong, all=False):  # in one process, and all must stop
            raise NotFinite(f"Healing stopped at step {self.global_step + 1} because the {what} is not finite")
