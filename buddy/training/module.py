"""LightningModules over budgets: what training, validation and test of a routed model have in common; and the router's.

`RoutingModule` is all that a Lightning user needs: it calibrates the router, trains it against the frozen backbone,
validates it at every budget and tests it as `buddy evaluate` does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric

from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM
from buddy.errors import BudgetError, TrainingError
from buddy.io import cache_folder
from buddy.losses import Objective, draw_budgets
from buddy.metrics.perplexity import Reference, Scores, WindowResult, keys_of, measure, scores_from
from buddy.router import scores_of
from buddy.training.estimators import Estimate, Estimator, TrainingBatch, estimator_for

if TYPE_CHECKING:
    from buddy.data.module import TextData

SHORTEST_PREFIX = 16  # positions of a window with a shorter prefix are not trained on
VALIDATION_STATES = 2**28  # bytes of the dense model's hidden states that are kept from one validation to the next
LIGHTNING_PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


class BudgetModule(LightningModule):
    """Trains a part of a `RoutedLM`, validates and tests the whole of it at every budget.

    The backbone is frozen and never saved. Batches are token tensors (B, T) without padding, or mappings with
    "input_ids" and, for validation and test, the numbers "window" and "document" (B,); "labels" are not read.

    Validation logs `val/kl/0.75`, `val/loss/0.75` (cross-entropy, nats per token) and `val/perplexity/0.75` for each
    budget, and `val/kl` and `val/loss`, the means over the budgets below full depth. Test logs the same under `test/`.

    Args:
        model: backbone and router.
        budgets: fractions of the layers, or other budgets such as "22layers"; "auto" is for test alone.
        prompt: tokens of each window that validation and test read and do not score; a quarter of the window by
            default. Training scores from position 16 on, if plans are made for each token.
        lr, warmup_steps, weight_decay: AdamW with linear warm-up, then cosine to a tenth of the rate.
        seed: determines all random draws, together with the number of the micro-batch.
        reference: shares the dense model's results with the tests of other routers on the same windows.

    Attributes:
        model: backbone and router.
        scores: `Scores` of the last validation or test, one for each budget.
    """

    model: RoutedLM
    prefix: ClassVar[str]  # of the names under which training logs
    activity: ClassVar[str]  # in messages
    advice: ClassVar[str]  # what to do where a step is not finite

    def __init__(
        self,
        model: RoutedLM,
        *,
        budgets: Sequence[float | str],
        lr: float,
        prompt: int | None = None,
        warmup_steps: int = 20,
        weight_decay: float = 0.0,
        seed: int = 0,
        reference: Reference | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(budgets, Sequence) or not budgets:
            raise BudgetError(f"budgets is {budgets!r}; give a list of one or more, such as [1.0, 0.75, 0.5].")
        object.__setattr__(self, "model", model)  # not as a submodule: it stays out of this module's state and modes
        self.keys = keys_of(model, budgets)
        self.prompt, self.seed = prompt, seed
        self.lr, self.warmup_steps, self.weight_decay = lr, warmup_steps, weight_decay  # `Tuner.lr_find` sets `lr`
        # Budgets that round to one K count once, in every training.
        self.grid = list(dict.fromkeys(key for key in self.keys.values() if isinstance(key, int)))
        self.train_means = nn.ModuleDict({str(k): MeanMetric(nan_strategy="error") for k in sorted(self.grid)})
        self._reference, self._shares_reference = reference or Reference(max_bytes=0), reference is not None
        self._rows: list[WindowResult] = []  # of the windows that this process has measured in a validation or test
        self.scores: list[Scores] = []
        self.router: Any = None  # the router, where it is trained

    @property
    def below(self) -> list[int]:
        """K of the budgets below full depth, or of all where none is."""
        return sorted(k for k in self.grid if k < self.model.geometry.layers) or sorted(self.grid)

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Groups of parameters to train, each with its learning rate."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Move the backbone, which Lightning does not know, to the trainer's device.

        Raises:
            BudgetError: no budget to train on.
            TrainingError: a precision that would change the weights, or steps of changing numbers of micro-batches.
        """
        if stage == "fit" and not self.grid:
            raise BudgetError("The budget auto is for test alone; add one to train on, such as 0.75.")
        if self.trainer.precision not in LIGHTNING_PRECISIONS:
            raise TrainingError(
                f"trainer.precision={self.trainer.precision} would cast the router, which stays in float32; choose one "
                f"of {', '.join(LIGHTNING_PRECISIONS)}, and backbone.dtype for the backbone."
            )
        schedulers = [each for each in self.trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]
        if any(len({*each.scheduling.values()}) > 1 for each in schedulers):
            raise TrainingError(
                "A GradientAccumulationScheduler that changes the number of micro-batches would repeat windows; give "
                "the Trainer one accumulate_grad_batches."
            )
        self._val_reference = Reference(VALIDATION_STATES)
        if not self._shares_reference:  # weights may have changed since the last test
            self._reference = Reference(max_bytes=0)
        self.model.backbone.model.to(self.trainer.strategy.root_device)
        self.model.to(self.trainer.strategy.root_device)

    def teardown(self, stage: str) -> None:
        """Move the router back to the backbone's device: Lightning brings its modules to the CPU."""
        self.model.to(self.model.backbone.device)
        if self.model.adapter is not None:
            self.model.adapter.parts.to(self.model.backbone.device)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the groups; warm-up, then cosine to a tenth."""
        groups = [{"params": params, "lr": rate} for params, rate in self.groups()]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, log the norm, and stop before a step that is not finite.

        Where a gradient scaler is at work, it skips such a step by itself and lowers its scale.
        """
        gradients = [p.grad for params, _ in self.groups() for p in params if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            self._require_finite("gradient", norm)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log(f"{self.prefix}/gradient_norm", norm)

    def on_fit_start(self) -> None:
        """The router that is trained, if one is, draws its dropout and noise: Lightning keeps modes as they are."""
        if self.router is not None:
            self.router.train()

    def on_train_end(self) -> None:
        """From now on the router is used."""
        if self.router is not None:
            self.router.eval()

    def on_train_start(self) -> None:
        """Begin the logged means anew."""
        for metric in self.train_means.values():
            metric.reset()

    def on_validation_epoch_start(self) -> None:
        """Forget the rows of a validation or test that was stopped."""
        self._rows = []

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the windows of a batch at every budget."""
        self._measure(batch, self.grid, self._val_reference)

    def on_validation_epoch_end(self) -> None:
        """Score the rows of all processes, and log the scores."""
        self._score("val", {budget: key for budget, key in self.keys.items() if isinstance(key, int)})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As `validation_step`, with the budgets "auto" too."""
        self._measure(batch, list(dict.fromkeys(self.keys.values())), self._reference)

    def on_test_epoch_end(self) -> None:
        """Score the rows of all processes, and log the scores."""
        self._score("test", self.keys)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other weights; in `fit` this module's rates replace those saved with the optimizer.

        Raises:
            TrainingError: a tensor is missing, unknown, or of another shape.
        """
        held, given = (
            {k: v.shape for k, v in state.items()} for state in (self.state_dict(), checkpoint["state_dict"])
        )
        wrong = sorted({k for k in {**held, **given} if held.get(k) != given.get(k)})
        if wrong:
            raise TrainingError(
                f"The checkpoint is of another router or adapter (it differs in {', '.join(wrong[:3])}); give "
                "ckpt_path a checkpoint of this recipe, or leave it out."
            )
        own = type(self).configure_optimizers is BudgetModule.configure_optimizers
        if self._trainer is None or self.trainer.state.fn != "fit" or not own or "lr_schedulers" not in checkpoint:
            return
        scheduler, groups = checkpoint["lr_schedulers"][0], checkpoint["optimizer_states"][0]["param_groups"]
        if "lr_lambdas" not in scheduler:  # one that a callback put in its place, as for averaged weights
            return
        scheduler["base_lrs"] = [rate for _, rate in self.groups()]
        factor = self._factor(scheduler["last_epoch"])
        for group, rate in zip(groups, scheduler["base_lrs"], strict=True):
            group |= {"initial_lr": rate, "lr": rate * factor, "weight_decay": self.weight_decay}

    def _batch(self, batch: Any, batch_idx: int, grid: Sequence[int]) -> tuple[TrainingBatch, torch.Generator]:
        """A training batch with budgets drawn from the grid, and the generator for all further draws of its step.

        Both depend on the seed and the micro-batch's number alone, which counts on over epochs and resumed runs.
        Processes that share a batch draw what one alone would draw for it.
        """
        ids, accumulated = self._token_ids(batch), self.trainer.accumulate_grad_batches
        number = self.global_step * accumulated + batch_idx % accumulated
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number * 1_009)
        rank, processes = self.global_rank, self.trainer.world_size
        torch.manual_seed(generator.initial_seed() + rank)  # for dropout and noise that take no generator
        all_executed = draw_budgets(grid, len(ids) * processes, generator)
        executed = all_executed[rank::processes].to(ids.device)
        prompt = self._prompt(ids)
        first = prompt - 1 if self.model.settings.prompt_plan == "shared" else min(prompt - 1, SHORTEST_PREFIX)
        scored = torch.arange(first, ids.shape[1] - 1, device=ids.device)
        return TrainingBatch(ids, executed, scored, prompt, all_executed, rank), generator

    def _token_ids(self, batch: Any) -> Tensor:
        """(B, T) long, of a batch of any kind that is documented.

        Raises:
            TrainingError: no token ids, padding, or windows longer than the model's context.
        """
        if isinstance(batch, list | tuple) and len(batch) == 1:  # of a TensorDataset
            batch = batch[0]
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise TrainingError(
                'A batch has no token ids; give tensors of whole numbers (rows, tokens), or mappings with "input_ids".'
            )
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and not mask.all():
            raise TrainingError("A batch has padding, which would be scored; give windows of one length without it.")
        if ids.shape[1] > self.model.backbone.context_length:
            raise TrainingError(
                f"A window has {ids.shape[1]} tokens; give at most the {self.model.backbone.context_length} that the "
                "model can read."
            )
        return ids

    def _prompt(self, ids: Tensor) -> int:
        prompt = max(1, ids.shape[1] // 4) if self.prompt is None else self.prompt
        if not 1 <= prompt < ids.shape[1]:
            raise TrainingError(f"prompt is {prompt}; give 1 or more, and less than the {ids.shape[1]} of a window.")
        return prompt

    def _measure(self, batch: Any, keys: Sequence[int | str], reference: Reference) -> None:
        """Add the rows of a batch, measured in the precision of the weights."""
        ids = self._token_ids(batch)
        if isinstance(batch, Mapping) and "window" in batch:
            windows, documents = batch["window"].tolist(), batch["document"].tolist()
        else:
            before = len({row.window for row in self._rows})
            world = self.trainer.world_size
            windows = documents = [(before + row) * world + self.global_rank for row in range(len(ids))]
        # Caches of the model outlive this block, and tensors of inference mode could not be trained with.
        with torch.inference_mode(False), torch.autocast(ids.device.type, enabled=False):
            prompt, ids = self._prompt(ids), ids.clone()
            rows = measure(self.model, ids, windows, documents, keys, prompt=prompt, reference=reference)
        self._rows += [row for row in rows if row.window >= 0]  # the others fill up, so that processes stay together

    def _score(self, stage: str, keys: Mapping[float | str, int | str]) -> None:
        """Gather the rows of all processes, add them up in the order of windows, and log the scores."""
        rows, self._rows = self._rows, []
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        self.scores = scores_from(rows, keys)
        values, below = {}, {}
        for each in self.scores:
            values[f"{stage}/kl/{each.budget}"] = each.mean_kl
            values[f"{stage}/loss/{each.budget}"] = each.mean_loss
            values[f"{stage}/perplexity/{each.budget}"] = each.perplexity
            if keys[each.budget] in self.below:
                below[keys[each.budget]] = each
        if below:
            values[f"{stage}/kl"] = mean(each.mean_kl for each in below.values())
            values[f"{stage}/loss"] = mean(each.mean_loss for each in below.values())
        self.log_dict(values, sync_dist=True)

    def _log_means(self, objective: Tensor, executed: Tensor, batch_idx: int) -> None:
        """Gather the objective (B,) by budget, and log the means since the last time when logging is due."""
        for k, metric in self.train_means.items():
            metric.update(objective, (executed == int(k)).float())
        micro_batches = (batch_idx + 1) % self.trainer.accumulate_grad_batches  # of this step so far
        if micro_batches or not self._logs_now():
            return
        for k, metric in self.train_means.items():
            value = metric.compute()
            if not value.isnan():  # drawn for no row
                self.log(f"{self.prefix}/objective_{k}_layers", value)
            metric.reset()

    def _logs_now(self) -> bool:
        """Whether this step's curves are logged; with log_every_n_steps=0 none are."""
        every = self.trainer.log_every_n_steps
        return every > 0 and (self.global_step + 1) % every == 0

    def _factor(self, step: int) -> float:
        warmup, total = self.warmup_steps, max(self.trainer.estimated_stepping_batches, 1)
        return min(1.0, (step + 1) / (warmup + 1)) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(step / total, 1.0))))

    def _step_loss(self, loss: Tensor, value: Tensor) -> Tensor:
        """What a training step returns: the mean objective, with the gradient of an estimator's loss.

        The value of that loss itself means nothing under some estimators, and Lightning's `Tuner.lr_find` compares it.
        A parameter that the loss does not reach, such as those of an adapter's layer that no row runs, has a gradient
        of 0: processes side by side wait for each of them.

        Args:
            loss: () of the estimator, with gradients.
            value: (B,) objective of each row, nats per token, without.
        """
        loss = loss + 0.0 * sum(parameter.sum() for params, _ in self.groups() for parameter in params)
        return loss + (value.mean() - loss).detach()

    def _require_finite(self, what: str, *values: Tensor) -> None:
        wrong = not all(bool(value.isfinite().all()) for value in values)
        if self.trainer.strategy.reduce_boolean_decision(wrong, all=False):  # in one process, and all must stop
            raise TrainingError(
                f"{self.activity} stopped at step {self.global_step + 1} because the {what} is not finite; "
                f"{self.advice}."
            )


class RoutingModule(BudgetModule):
    """Trains the router of a `RoutedLM`, once it is calibrated.

    A router that is not calibrated yet is calibrated at the beginning of `Trainer.fit`, on the calibration windows of
    the data module; `calibrate` does the same without a trainer, for routers that have nothing to train.

    Args:
        model: backbone and router.
        budgets: fractions of the layers, or other budgets such as "22layers". Full depth is not trained on where there
            is another: all plans are the same there, and nothing could be learned.
        estimator: turns windows and budgets into a loss for the router; a name of group `buddy.estimators`, or an
            `Estimator`. Layerwise routers have one of their own.
        objective: judges plans; KL to the dense model by default.
        bridge_lr: learning rate of the model's bridges, which are trained in the same steps; 0 leaves them as they are.
        prompt, lr, warmup_steps, weight_decay, seed, reference: as for `BudgetModule`.

    Raises:
        TrainingError: `bridge_lr` with an estimator that does not back-propagate.
    """

    prefix, activity, advice = "train", "Training", "lower the learning rate (optimizer.lr in a recipe)"

    def __init__(
        self,
        model: RoutedLM,
        *,
        budgets: Sequence[float | str],
        estimator: str | Estimator = "perturbed",
        objective: Objective | None = None,
        bridge_lr: float = 0.0,
        prompt: int | None = None,
        lr: float = 6e-3,
        warmup_steps: int = 20,
        weight_decay: float = 0.0,
        seed: int = 0,
        reference: Reference | None = None,
    ) -> None:
        optimizer: dict[str, Any] = {"lr": lr, "warmup_steps": warmup_steps, "weight_decay": weight_decay}
        super().__init__(model, budgets=budgets, prompt=prompt, seed=seed, reference=reference, **optimizer)
        self.router = model.router
        self.start = copy.deepcopy(model.router).requires_grad_(False)
        self.objective = objective or Objective()
        if isinstance(estimator, str):
            estimator = estimator_for(model.router, estimator, self.objective, {})
        self.estimator = estimator
        self.bridges, self.bridge_lr = None, bridge_lr
        if bridge_lr and model.bridges is not None:
            if not getattr(estimator, "backpropagates", False):
                raise TrainingError("Bridges are trained by back-propagation; choose the estimator surrogate for that.")
            self.bridges = model.bridges.trainable()
        self.calibrated = False

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The router's own groups, each with its factor on the learning rate; and the bridges that are trained."""
        rates = [(group["params"], self.lr * group.get("scale", 1.0)) for group in self.router.parameter_groups()]
        return rates if self.bridges is None else [*rates, (list(self.bridges.parameters()), self.bridge_lr)]

    def calibrate(self, data: TextData) -> None:
        """Let the router measure what it needs, on the calibration windows of a text, set up; its buffers change."""
        windows = data.calibration.input_ids
        # One window at a time is quickest on a CPU, and searches that look at few windows pay for no others.
        size = 1 if self.model.backbone.device.type == "cpu" else data.batch_size
        prompt, store = self._prompt(windows), cache_folder("calibration")
        probe = CalibrationProbe(
            self.model, windows, size, layer_counts=self.grid, seed=self.seed, prompt=prompt, store=store
        )
        self.router.calibrate(probe)
        self.mark_calibrated()

    def mark_calibrated(self) -> None:
        """The router is calibrated; training starts from its present state."""
        self.start.load_state_dict(self.router.state_dict())
        self.calibrated = True

    def setup(self, stage: str) -> None:
        """As `BudgetModule.setup`.

        Raises:
            TrainingError: nothing to train.
        """
        super().setup(stage)
        if stage == "fit" and not self.router.trainable:
            raise TrainingError(
                f"{type(self.router).__name__} has nothing to train; call calibrate(data), and use the model."
            )
        if stage == "fit" and min(self.grid) == self.model.geometry.layers:
            raise TrainingError("No budget is below full depth, so nothing can be learned; add one, such as 0.5.")

    def on_fit_start(self) -> None:
        """Calibrate the router, by the first process, unless that was done: a checkpoint is loaded by now.

        Parameters and buffers are written in place, so the optimizer and DDP need not know.

        Raises:
            TrainingError: no calibration windows.
        """
        super().on_fit_start()
        if self.calibrated:
            return
        data = self.trainer.datamodule
        if not hasattr(data, "calibration"):
            raise TrainingError("The router needs calibration windows; give Trainer.fit a TextData as its datamodule.")
        if self.trainer.is_global_zero:
            self.calibrate(data)
        state = {name: tensor.cpu() for name, tensor in self.router.state_dict().items()}
        self.router.load_state_dict(self.trainer.strategy.broadcast(state))
        self.mark_calibrated()

    @torch.random.fork_rng(devices=[])  # a step seeds torch, and a shuffled `DataLoader` draws from it, too
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on windows (B, T)."""
        prepared, generator = self._batch(batch, batch_idx, self.below)
        estimate = self.estimator(self.model, prepared, generator)
        if not isinstance(estimate, Estimate):
            name, found = type(self.estimator).__name__, type(estimate).__name__
            raise TrainingError(f"{name} returns {found}; return an Estimate of buddy.training.estimators.")
        self._require_finite("loss", estimate.loss.detach(), estimate.objective)
        self._log(estimate, prepared, batch_idx)
        return self._step_loss(estimate.loss, estimate.objective)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed training does not calibrate again."""
        checkpoint["calibrated"] = self.calibrated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As `BudgetModule.on_load_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self.calibrated = checkpoint.get("calibrated", True)  # those of version 0.1 do not say so

    @torch.no_grad()
    def _log(self, estimate: Estimate, batch: TrainingBatch, batch_idx: int) -> None:
        """Objective, its mean per budget since the last log, and how far plans moved: from the start and by token.

        Over all processes, which take the same branches: either every row has a budget below full depth, or none has.
        """
        below = batch.executed < self.model.geometry.layers
        if below.any():
            self.log("train/objective", estimate.objective[below].mean(), sync_dist=True)
        self._log_means(estimate.objective, batch.executed, batch_idx)
        if not self._logs_now() or not below.any():
            return
        runs = estimate.runs[below]
        changed = (runs[:, 1:] != runs[:, :-1]).any(-1).float().mean()
        self.log("train/changed_plans", changed, sync_dist=True)
        if estimate.context is not None:  # the plans of a layerwise router need a forward of their own
            scores = scores_of(self.start, estimate.context)
            start = self.model.plan(scores, batch.executed, batch.prompt)[below]
            moved = torch.stack([(runs & ~start).sum(), runs.sum()]).float()
            moved, ran = self.trainer.strategy.reduce(moved, reduce_op="sum")
            self.log("train/moved_layers", moved / ran)
