"""The LightningModule: what it trains, saves, logs and refuses."""

import copy
import math

import lightning
import pytest
import torch
from torch import nn

from buddy.console import quiet
from buddy.data.module import TextData
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import TrainingError
from buddy.losses import Objective
from buddy.training.estimators import Perturbed
from buddy.training.module import NotFinite, RoutingModule
from routers.buddy import BuddyRouter
from tests.tiny import tiny_backbone, tiny_tokenizer

GRID = [6, 4, 3]
SETTINGS = {"prompt": 8, "lr": 1e-2, "warmup_steps": 2, "weight_decay": 0.0, "clip": 10.0, "seed": 0}


def make(estimator=None, hidden: int = 16, **settings) -> RoutingModule:
    backbone = tiny_backbone("llama")
    torch.manual_seed(0)
    routed = RoutedLM(backbone, BuddyRouter(geometry_of(backbone), hidden=hidden))
    return RoutingModule(routed, estimator or Perturbed(Objective()), GRID, **{**SETTINGS, **settings})


@pytest.fixture
def run(small, tmp_path):
    """Fits a module for so many steps and gives back its trainer."""

    def run(module: RoutingModule, steps: int, ckpt_path=None, max_steps=None, **options) -> lightning.Trainer:
        with quiet():
            trainer = lightning.Trainer(
                max_steps=steps,
                max_epochs=-1,
                accelerator="cpu",
                default_root_dir=tmp_path,
                logger=options.pop("logger", False),
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                **options,
            )
            data = TextData(tiny_tokenizer(), str(small.text), window=32, steps=steps)
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run


def test_only_the_router_is_trained(run):
    module = make()
    before = copy.deepcopy([module.routed.backbone.model.state_dict(), module.router.state_dict()])
    run(module, 2)
    after = [module.routed.backbone.model.state_dict(), module.router.state_dict()]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    changed = {name for name in before[1] if not torch.equal(before[1][name], after[1][name])}
    assert changed == {"input.weight", "input.bias", "output.weight", "output.bias"}
    assert not any(p.requires_grad or p.grad is not None for p in module.routed.backbone.model.parameters())
    assert not module.routed.backbone.model.training


def test_a_checkpoint_is_small_and_without_the_backbone(run, tmp_path):
    path = tmp_path / "one.ckpt"
    run(make(hidden=4), 1).save_checkpoint(path)
    assert path.stat().st_size < 40_000  # the tiny backbone has a megabyte
    names = set(torch.load(path, weights_only=True)["state_dict"])
    parts = {"prior", "input.weight", "input.bias", "output.weight", "output.bias"}
    assert names == {f"{owner}.{part}" for owner in ("router", "start") for part in parts}


def test_a_checkpoint_of_another_router_is_refused(run, tmp_path):
    run(make(hidden=4), 1).save_checkpoint(tmp_path / "one.ckpt")
    module = make(hidden=5)
    before = copy.deepcopy(module.router.state_dict())
    with pytest.raises(TrainingError, match=r"of another router \(it differs in router.input.bias, router.input.we"):
        run(module, 2, ckpt_path=tmp_path / "one.ckpt")
    assert all(torch.equal(before[name], value) for name, value in module.router.state_dict().items())


class Rates(lightning.Callback):
    """The learning rate of every group at every step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_start(self, trainer, *_) -> None:
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_learning_rates_warm_up_and_fall_to_a_tenth(run):
    rates = Rates()
    run(make(lr=1.0, warmup_steps=3), 8, callbacks=[rates])
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    expected = [min(1, (step + 1) / 4) * value for step, value in enumerate(cosine)]
    for scale, seen in zip((0.25, 1.0, 3.0), zip(*rates.seen, strict=True), strict=True):
        assert seen == pytest.approx([scale * rate for rate in expected])


def test_the_recipes_rate_holds_over_the_checkpoints(run, tmp_path):
    run(make(lr=1.0, warmup_steps=0), 2).save_checkpoint(tmp_path / "two.ckpt")
    rates = Rates()
    run(make(lr=0.5, warmup_steps=0), 8, ckpt_path=tmp_path / "two.ckpt", callbacks=[rates])
    expected = [0.5 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 8))) for step in range(2, 8)]
    assert [groups[1] for groups in rates.seen] == pytest.approx(expected)


class Spoilt:
    """An estimator whose loss or gradient is spoilt at the third step."""

    def __init__(self, what: str) -> None:
        self.what, self.good, self.step = what, Perturbed(Objective()), 0

    def __call__(self, routed, batch, generator):
        estimate, self.step = self.good(routed, batch, generator), self.step + 1
        if self.step == 3 and self.what == "gradient":
            estimate.loss.register_hook(lambda gradient: gradient * math.inf)
        if self.step == 3 and self.what == "loss":
            estimate = type(estimate)(estimate.loss * math.nan, estimate.objective, estimate.runs, estimate.context)
        if self.step == 3 and self.what == "objective":
            estimate.objective[:] = math.inf
        return estimate


class StopAfter(lightning.Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = trainer.global_step == self.steps


@pytest.mark.parametrize(("what", "named"), [("loss", "loss"), ("objective", "loss"), ("gradient", "gradient")])
def test_a_step_that_is_not_finite_is_not_taken(run, what, named):
    expected, module = make(), make(Spoilt(what))
    run(expected, 5, callbacks=[StopAfter(2)])
    with pytest.raises(NotFinite, match=f"stopped at step 3 because the {named} is not finite"):
        run(module, 5)
    for one, two in zip(module.router.parameters(), expected.router.parameters(), strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, two)


def test_the_gradient_is_clipped(run):
    module = make(clip=1e-3, lr=1.0)
    norms = []

    class Norm(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            gradients = [p.grad for p in pl_module.router.parameters()]
            norms.append(nn.utils.get_total_norm(gradients).item())
            norms.append(trainer.callback_metrics["train/gradient_norm"].item())

    run(module, 1, callbacks=[Norm()])
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1] > 1, "what is logged is the norm before clipping"


def test_what_is_logged(run, tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    run(make(lr=0.3, warmup_steps=0), 6, logger=logger, log_every_n_steps=2)
    events = EventAccumulator(str(tmp_path)).Reload()
    logged = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in ("objective", "gradient_norm", "changed_plans", "moved_layers"):
        assert len(logged[f"train/{tag}"]) == 3, tag
    for k in (3, 4):
        assert all(value > 0 for value in logged[f"train/objective_{k}_layers"])
    assert "train/objective_6_layers" not in logged
    assert all(0 < value <= 1 for value in logged["train/changed_plans"][1:])
    assert all(0 < value <= 1 for value in logged["train/moved_layers"][1:])


def test_at_the_start_no_plan_has_moved_or_changes(run):
    trainer = run(make(lr=1e-9, warmup_steps=0), 1, log_every_n_steps=1)
    assert trainer.callback_metrics["train/moved_layers"] == 0
    assert trainer.callback_metrics["train/changed_plans"] == 0
