"""LightningModules over budgets: what training, validation and test of a routed model have in common; and the router's.

`RoutingModule` is all that a Lightning user needs: it calibrates the router, trains it against the frozen backbone,
validates it at every budget and tests it as `buddy evaluate` does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from buddy.calibration.probe import CalibrationProbe
from buddy.console import quiet
from buddy.data.module import WindowBatches
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import TrainingError
from buddy.io import cache_folder
from buddy.losses import Objective, draw_budgets
from buddy.router import Context
from buddy.scoring.perplexity import Reference, Row, Scores, keys_of, measure, scores_from
from buddy.training.callbacks import ProgressLine
from buddy.training.estimators import Batch, Estimate, Estimator, estimator_for

if TYPE_CHECKING:
    from buddy.data.module import TextData

SHORTEST_PREFIX = 16  # positions of a window with a shorter prefix are not trained on
VALIDATION_STATES = 2**28  # bytes of the dense model's hidden states that are kept from one validation to the next
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")


class NotFinite(TrainingError):
    """A step that would have made the weights infinite or not a number; it was not taken."""


class BudgetModule(LightningModule):
    """Trains a part of a `RoutedLM`, validates and tests the whole of it at every budget.

    The backbone is frozen and never saved. Batches are token tensors (B, T), or mappings with "input_ids" and, for
    validation and test, the numbers "window" and "document" (B,).

    Validation logs `val/kl/0.75`, `val/loss/0.75` (cross-entropy, nats a token) and `val/perplexity/0.75` for each
    budget, and `val/kl` and `val/loss`, the means over the budgets below full depth. Test logs the same under `test/`.

    Args:
        model: backbone and router.
        budgets: fractions of the layers, or other budgets such as "22layers"; "auto" is for test alone.
        prompt: tokens of each window that are read, not scored; a quarter of the window by default.
        lr, warmup_steps, weight_decay: AdamW with linear warm-up, then cosine to a tenth of the rate.
        seed: of all random draws; with a micro-batch's number it determines them.
        reference: shares the dense model's results with the tests of other routers on the same windows.

    Attributes:
        rows: after test, one `Row` for each window and budget, of all processes.
        scores: after test, `Scores` for each budget.
    """

    prefix: ClassVar[str]  # of the names under which training logs
    activity: ClassVar[str]  # in messages
    advice: ClassVar[str]  # against losses that are not finite

    def __init__(
        self,
        model: RoutedLM,
        *,
        budgets: Sequence[float | str],
        prompt: int | None,
        lr: float,
        warmup_steps: int,
        weight_decay: float,
        seed: int,
        reference: Reference | None = None,
    ) -> None:
        super().__init__()
        self._held = (model,)  # in a tuple: the model stays out of this module's state and modes
        self.keys = keys_of(model, budgets)
        self.prompt, self.seed = prompt, seed
        self.settings = {"lr": lr, "warmup_steps": warmup_steps, "weight_decay": weight_decay}
        self.grid = [key for key in self.keys.values() if isinstance(key, int)]
        self.train_means, self.val_kl, self.val_loss = (self._metrics() for _ in range(3))
        self._reference, self._val_reference = reference or Reference(most=0), Reference(VALIDATION_STATES)
        self.rows: list[Row] = []
        self.scores: list[Scores] = []

    @property
    def model(self) -> RoutedLM:
        """Backbone and router."""
        return self._held[0]

    @property
    def below(self) -> list[int]:
        """K of the budgets below full depth, or of all where none is."""
        return sorted({k for k in self.grid if k < self.model.geometry.layers}) or sorted({*self.grid})

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Groups of parameters to train, each with its learning rate."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Move the backbone, which Lightning does not know, to the trainer's device.

        Raises:
            TrainingError: a precision that would change the weights.
        """
        if self.trainer.precision not in PRECISIONS:
            raise TrainingError(
                f"trainer.precision={self.trainer.precision} would cast the router, which stays in float32; choose one "
                f"of {', '.join(PRECISIONS)}, and backbone.dtype for the backbone."
            )
        self._val_reference = Reference(VALIDATION_STATES)
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
        optimizer = torch.optim.AdamW(groups, weight_decay=self.settings["weight_decay"])
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
        by_value = gradient_clip_algorithm == "value"
        parameters = [parameter for params, _ in self.groups() for parameter in params]
        norm = nn.utils.clip_grad_norm_(
            parameters, math.inf if by_value or not gradient_clip_val else gradient_clip_val
        )
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            self._require_finite("gradient", norm)
        if by_value:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.log(f"{self.prefix}/gradient_norm", norm)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the windows of a batch at every budget."""
        for row in self._measured(batch, batch_idx, list(dict.fromkeys(self.grid)), self._val_reference):
            for metric, value in ((self.val_kl, row.kl), (self.val_loss, row.loss)):
                metric[str(row.key)].update(value / row.tokens, row.tokens if row.window >= 0 else 0)

    def on_validation_epoch_end(self) -> None:
        """Log what was measured, over all processes."""
        kl, loss = ({k: metric.compute() for k, metric in part.items()} for part in (self.val_kl, self.val_loss))
        for part in (self.val_kl, self.val_loss):
            for metric in part.values():
                metric.reset()
        self._log_scores("val", {b: (kl[str(k)], loss[str(k)]) for b, k in self.keys.items() if str(k) in kl})

    def on_test_epoch_start(self) -> None:
        self.rows, self.scores = [], []

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure the windows of a batch at every budget; the rows are kept."""
        rows = self._measured(batch, batch_idx, list(dict.fromkeys(self.keys.values())), self._reference)
        self.rows += [row for row in rows if row.window >= 0]  # the others fill up, so that processes stay together

    def on_test_epoch_end(self) -> None:
        """Bring the rows of all processes together and add them up in the order of windows."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self.rows)
            self.rows = [row for part in parts for row in part]
        self.scores = scores_from(self.rows, self.keys)
        means = {s.budget: (s.mean_kl, s.loss.sum() / s.tokens.sum()) for s in self.scores}
        self._log_scores("test", {b: (torch.tensor(kl), torch.tensor(loss)) for b, (kl, loss) in means.items()})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The rates given to this module hold, not those saved with the optimizer; where they are the same, nothing
        changes."""
        scheduler, groups = checkpoint["lr_schedulers"][0], checkpoint["optimizer_states"][0]["param_groups"]
        scheduler["base_lrs"] = [rate for _, rate in self.groups()]
        factor = self._factor(scheduler["last_epoch"])
        for group, rate in zip(groups, scheduler["base_lrs"], strict=True):
            group |= {"initial_lr": rate, "lr": rate * factor, "weight_decay": self.settings["weight_decay"]}

    def differing_weights(self, checkpoint: dict[str, Any]) -> list[str]:
        """Names of what a checkpoint has, lacks, or has in another shape, against this module's state."""
        held, given = self.state_dict(), checkpoint["state_dict"]
        return sorted({*held} ^ {*given} | {k for k in {*held} & {*given} if held[k].shape != given[k].shape})

    def _batch(self, batch: Any, batch_idx: int, grid: Sequence[int]) -> tuple[Batch, torch.Generator]:
        """A training batch with budgets drawn from the grid, and the generator for all further draws of its step.

        Both depend on the seed and the micro-batch's number alone, which counts on over epochs and resumed runs.
        Processes that share a batch draw what one alone would draw for it.
        """
        ids, accumulated = _token_ids(batch), self.trainer.accumulate_grad_batches
        number = self.global_step * accumulated + batch_idx % accumulated
        self._draw_seed = self.seed * 1_000_003 + number * 1_009
        generator = torch.Generator().manual_seed(self._draw_seed)
        rank, processes = self.global_rank, self.trainer.world_size
        everyone = draw_budgets(grid, len(ids) * processes, generator)
        executed = everyone[rank::processes].to(ids.device)
        prompt = self._prompt(ids)
        first = prompt - 1 if self.model.prompt_plan == "shared" else min(prompt - 1, SHORTEST_PREFIX)
        scored = torch.arange(first, ids.shape[1] - 1, device=ids.device)
        return Batch(ids, executed, scored, prompt, everyone, rank), generator

    def _prompt(self, ids: Tensor) -> int:
        prompt = max(1, ids.shape[1] // 4) if self.prompt is None else self.prompt
        if prompt >= ids.shape[1]:
            raise TrainingError(f"prompt is {prompt}, but windows have {ids.shape[1]} tokens; make it smaller.")
        return prompt

    def _measured(self, batch: Any, batch_idx: int, keys: Sequence[int | str], reference: Reference) -> list[Row]:
        """Rows of a batch, in the numeric precision of the weights; the window is −1 in batches that only fill up."""
        ids = _token_ids(batch)
        if isinstance(batch, Mapping) and "window" in batch:
            windows, documents = batch["window"].tolist(), batch["document"].tolist()
        else:
            first = (batch_idx * self.trainer.world_size + self.global_rank) * len(ids)
            windows = documents = list(range(first, first + len(ids)))
        # Caches of the model outlive this block, and tensors of inference mode could not be trained with.
        with torch.inference_mode(False), torch.autocast(ids.device.type, enabled=False):
            prompt, ids = self._prompt(ids), ids.clone()
            return measure(self.model, ids, windows, documents, keys, prompt=prompt, reference=reference)

    def _log_scores(self, stage: str, found: Mapping[float | str, tuple[Tensor, Tensor]]) -> None:
        """Log KL and cross-entropy for each budget, and their means over the budgets below full depth."""
        values: dict[str, Tensor] = {}
        for budget, (kl, loss) in found.items():
            names = (f"{stage}/kl/{budget}", f"{stage}/loss/{budget}", f"{stage}/perplexity/{budget}")
            values |= dict(zip(names, (kl, loss, loss.exp()), strict=True))
        below = {self.keys[budget]: pair for budget, pair in found.items() if self.keys[budget] in self.below}
        if below:
            kl, loss = (torch.stack(part).mean() for part in zip(*below.values(), strict=True))
            values |= {f"{stage}/kl": kl, f"{stage}/loss": loss}
        self.log_dict(values, sync_dist=True)

    def _log_means(self, objective: Tensor, executed: Tensor) -> None:
        """Gather the objective (B,) by budget, and log the means since the last time when logging is due."""
        for k, mean in self.train_means.items():
            mean.update(objective, (executed == int(k)).float())
        if (self.global_step + 1) % self.trainer.log_every_n_steps:
            return
        for k, mean in self.train_means.items():
            value = mean.compute()
            if not value.isnan():  # drawn for no row
                self.log(f"{self.prefix}/objective_{k}_layers", value)
            mean.reset()

    def _factor(self, step: int) -> float:
        total = self.trainer.max_steps if self.trainer.max_steps > 0 else self.trainer.estimated_stepping_batches
        warmup, total = self.settings["warmup_steps"], max(total, 1)
        return min(1.0, (step + 1) / (warmup + 1)) * (0.1 + 0.45 * (1 + math.cos(math.pi * min(step / total, 1.0))))

    def _require_finite(self, what: str, *values: Tensor) -> None:
        wrong = not all(bool(value.isfinite().all()) for value in values)
        if self.trainer.strategy.reduce_boolean_decision(wrong, all=False):  # in one process, and all must stop
            raise NotFinite(
                f"{self.activity} stopped at step {self.global_step + 1} because the {what} is not finite{self.advice}"
            )

    def _metrics(self) -> nn.ModuleDict:
        return nn.ModuleDict({str(k): MeanMetric(nan_strategy="error") for k in sorted({*self.grid})})


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
        objective: by which plans are judged; KL to the dense model by default.
        prompt, lr, warmup_steps, weight_decay, seed, reference: as for `BudgetModule`.
    """

    prefix, activity, advice = "train", "Training", "; lower optimizer.lr or objective.sigma"

    def __init__(
        self,
        model: RoutedLM,
        *,
        budgets: Sequence[float | str],
        estimator: str | Estimator = "perturbed",
        objective: Objective | None = None,
        prompt: int | None = None,
        lr: float = 6e-3,
        warmup_steps: int = 20,
        weight_decay: float = 0.0,
        seed: int = 0,
        reference: Reference | None = None,
    ) -> None:
        super().__init__(
            model,
            budgets=budgets,
            prompt=prompt,
            lr=lr,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            seed=seed,
            reference=reference,
        )
        self.strict_loading = False  # the backbone is in no checkpoint; `on_load_checkpoint` is strict for the rest
        self.router = model.router
        self.start = copy.deepcopy(model.router).requires_grad_(False)
        self.objective, self._estimator = objective or Objective(), estimator
        self.calibrated = False

    @cached_property
    def estimator(self) -> Estimator:
        """What turns windows and budgets into a loss."""
        if isinstance(self._estimator, str):
            return estimator_for(self.router, self._estimator, self.objective, {})
        return self._estimator

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """The router's own groups, each with its factor on the learning rate."""
        return [(group["params"], self.settings["lr"] * group["scale"]) for group in self.router.parameter_groups()]

    def calibrate(self, source: TextData | CalibrationProbe) -> None:
        """Let the router measure what it needs; its buffers are set in place.

        Args:
            source: the text, set up, whose calibration windows are measured; or a probe, which several routers of one
                recipe may share.
        """
        probe = source if isinstance(source, CalibrationProbe) else self._probe(source)
        probe.serve(self.model, self.grid)
        probe.seed = self.seed
        self.router.calibrate(probe)
        probe.release()
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

    def on_fit_start(self) -> None:
        """Calibrate the router, by the first process, unless that was done: a checkpoint is loaded by now.

        Only buffers are written, and in place, so the optimizer and DDP need not know.

        Raises:
            TrainingError: no calibration windows.
        """
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

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One step on windows (B, T)."""
        prepared, generator = self._batch(batch, batch_idx, self.below)
        estimate = self.estimator(self.model, prepared, generator)
        self._require_finite("loss", estimate.loss.detach(), estimate.objective)
        self._log(estimate, prepared)
        return estimate.loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A resumed training does not calibrate again."""
        checkpoint["calibrated"] = self.calibrated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another router, which `strict_loading = False` would let pass."""
        wrong = self.differing_weights(checkpoint)
        if wrong:
            raise TrainingError(
                f"The checkpoint is of another router (it differs in {', '.join(wrong[:3])}); give ckpt_path a "
                "checkpoint of this recipe, or leave it out."
            )
        self.calibrated = checkpoint.get("calibrated", True)  # those of version 0.1 do not say so
        super().on_load_checkpoint(checkpoint)

    def _probe(self, data: TextData) -> CalibrationProbe:
        # One window at a time is quickest on a CPU, and searches that look at few windows pay for no others.
        size = 1 if self.model.backbone.device.type == "cpu" else data.batch_size
        windows = data.calibration.input_ids
        return CalibrationProbe(
            self.model, windows, size, prompt=self._prompt(windows), store=cache_folder("calibration")
        )

    @torch.no_grad()
    def _log(self, estimate: Estimate, batch: Batch) -> None:
        """Objective, its mean per budget since the last log, and how far plans moved: from the start and by token.

        All of it over all processes, which are together here: either every row has a budget below full depth, or none.
        """
        free = batch.executed < self.model.geometry.layers
        if free.any():
            self.log("train/objective", estimate.objective[free].mean(), sync_dist=True)
        self._log_means(estimate.objective, batch.executed)
        if (self.global_step + 1) % self.trainer.log_every_n_steps or not free.any():
            return
        runs = estimate.runs[free]
        changed = (runs[:, 1:] != runs[:, :-1]).any(-1).float().mean()
        self.log("train/changed_plans", changed, sync_dist=True)
        if estimate.context is not None:  # the plans of a layerwise router need a forward of their own
            start = self._start_runs(estimate.context, batch)[free]
            moved = torch.stack([(runs & ~start).sum(), runs.sum()]).float()
            moved, ran = self.trainer.strategy.reduce(moved, reduce_op="sum")
            self.log("train/moved_layers", moved / ran)

    def _start_runs(self, context: Context, batch: Batch) -> Tensor:
        """(B, T, L) bool: the plans before training."""
        return self.model.plan(self.start.score(context), batch.executed, batch.prompt)


def evaluate(
    model: RoutedLM,
    windows: Windows,
    budgets: Sequence[float | str],
    *,
    prompt: int,
    batch_size: int = 4,
    reference: Reference | None = None,
    description: str | None = None,
) -> list[Scores]:
    """Scores of the model's router at each budget, by `Trainer.test`.

    Processes that are together share the batches out and all get all scores: bit-identical to those of one process
    with the same batches, because sums are taken in the order of the windows.

    Args:
        model: model and router, the same in all processes.
        windows: held-out text.
        budgets: fractions, each of which becomes K layers; or "auto", which chooses K for each window from its prompt.
        prompt: tokens of each window that are not scored.
        batch_size: windows per forward.
        reference: keeps what all routers share, where several are evaluated on the same windows in the same way.
        description: of the progress line; None shows none.

    Raises:
        BudgetError: a budget out of range, or "auto" without a budget predictor.
    """
    module = RoutingModule(model, budgets=budgets, prompt=prompt, reference=reference)
    device = model.backbone.device
    with quiet():
        trainer = Trainer(
            accelerator=device.type,
            devices=[device.index] if device.index is not None else 1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=description is not None,
            enable_model_summary=False,
            inference_mode=False,
            callbacks=[] if description is None else [ProgressLine(description)],
        )
        trainer.test(module, WindowBatches(windows, batch_size), verbose=False)
    return module.scores


def _token_ids(batch: Any) -> Tensor:
    """(B, T) long."""
    return batch["input_ids"] if isinstance(batch, Mapping) else batch
