"""The LightningModule: what it trains, saves, logs and refuses."""

import copy
import math
import warnings
from itertools import pairwise

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LambdaCallback, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

from buddy.console import quiet
from buddy.data.module import WindowBatches
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import TrainingError
from buddy.losses import Objective
from buddy.training.estimators import Perturbed
from buddy.training.module import RoutingModule
from routers.buddy import BuddyRouter
from routers.shortgpt import ShortGPT
from tests.testing.bad import SoundGates
from tests.tiny import tiny_backbone
from tests.training.stopping import same

pytestmark = pytest.mark.slow

BUDGETS = [1.0, 0.75, 0.5]  # 6, 4 and 3 layers


def make(estimator="perturbed", hidden: int = 16, calibrated: bool = True, **settings) -> RoutingModule:
    backbone = tiny_backbone("llama")
    torch.manual_seed(0)
    routed = RoutedLM(backbone, BuddyRouter(geometry_of(backbone), hidden=hidden))
    settings = {"prompt": 8, "lr": 1e-2, "warmup_steps": 2, **settings}
    module = RoutingModule(routed, budgets=BUDGETS, estimator=estimator, **settings)
    if calibrated:
        module.mark_calibrated()
    return module


def test_only_the_router_is_trained(run):
    module = make()
    before = copy.deepcopy([module.model.backbone.model.state_dict(), module.router.state_dict()])
    run(module, 2)
    after = [module.model.backbone.model.state_dict(), module.router.state_dict()]
    assert same(before[0], after[0])
    changed = {name for name in before[1] if not torch.equal(before[1][name], after[1][name])}
    assert changed == {"input.weight", "input.bias", "output.weight", "output.bias"}
    assert not any(p.requires_grad or p.grad is not None for p in module.model.backbone.model.parameters())
    assert not module.model.backbone.model.training


def test_a_checkpoint_of_another_router_is_refused(run, tmp_path):
    run(make(hidden=4), 1).save_checkpoint(tmp_path / "one.ckpt")
    module = make(hidden=5)
    before = copy.deepcopy(module.router.state_dict())
    with pytest.raises(TrainingError, match=r"router\.input\.bias"):
        run(module, 2, ckpt_path=tmp_path / "one.ckpt")
    assert same(before, module.router.state_dict())


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_checkpoint_is_validated_and_tested_by_a_trainer_of_its_own(run, text, tmp_path, verb, weights_only):
    trained = make()
    run(trained, 2).save_checkpoint(tmp_path / "two.ckpt", weights_only=weights_only)
    module, off = make(), dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    with quiet():
        trainer = lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, inference_mode=False, **off)
        getattr(trainer, verb)(module, datamodule=text, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert same(module.router.state_dict(), trained.router.state_dict())
    assert module.scores


def test_learning_rates_warm_up_and_fall_to_a_tenth(run):
    rates: list[list[float]] = []
    note = LambdaCallback(
        on_train_batch_start=lambda trainer, *_: rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])
    )
    run(make(lr=1.0, warmup_steps=3), 8, callbacks=[note])
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    expected = [min(1, (step + 1) / 4) * value for step, value in enumerate(cosine)]
    for scale, seen in zip((0.25, 1.0, 3.0), zip(*rates, strict=True), strict=True):
        assert seen == pytest.approx([scale * rate for rate in expected])


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


def stop_after(steps: int) -> LambdaCallback:
    """The training ends there, as planned for longer."""

    def stop(trainer, *_) -> None:
        trainer.should_stop = trainer.global_step == steps

    return LambdaCallback(on_train_batch_end=stop)


@pytest.mark.parametrize(("what", "named"), [("loss", "loss"), ("objective", "loss"), ("gradient", "gradient")])
def test_a_step_that_is_not_finite_is_not_taken(run, what, named):
    expected, module = make(), make(Spoilt(what))
    run(expected, 5, callbacks=[stop_after(2)])
    with pytest.raises(TrainingError, match=f"step 3.*{named}"):
        run(module, 5)
    assert same(module.router.state_dict(), expected.router.state_dict())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_gradient_is_clipped_as_the_trainer_says(run, algorithm):
    clipped = []
    note = LambdaCallback(
        on_train_batch_end=lambda trainer, module, *_: clipped.extend(
            p.grad.clone() for p in module.router.parameters()
        )
    )
    trainer = run(make(), 1, callbacks=[note], gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
    size = nn.utils.get_total_norm(clipped) if algorithm == "norm" else max(each.abs().max() for each in clipped)
    assert size.item() == pytest.approx(1e-3, rel=1e-3)
    assert trainer.callback_metrics["train/gradient_norm"] > 1, "what is logged is the norm before clipping"


def test_a_micro_batch_draws_what_no_other_does_and_a_resumed_run_repeats_it(run, tmp_path):
    class Draws(Perturbed):
        def __call__(self, routed, batch, generator):
            draws.append((batch.input_ids, generator.initial_seed()))
            return super().__call__(routed, batch, generator)

    def drawn(steps: int, **options) -> list:
        draws.clear()
        trainer = run(make(Draws(Objective())), steps, accumulate_grad_batches=2, **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return [*draws]

    draws: list = []
    whole, first = drawn(4), drawn(2)
    rest = drawn(4, ckpt_path=tmp_path / "last.ckpt")
    assert len({seed for _, seed in whole}) == 8
    assert [seed for _, seed in first + rest] == [seed for _, seed in whole]
    for (mine, _), (theirs, _) in zip(first + rest, whole, strict=True):
        assert torch.equal(mine, theirs)


def test_dropout_depends_on_the_seed_and_the_step_alone(run):
    def trained(noise: int, seed: int) -> dict:
        module = make("surrogate", seed=seed)
        drop = nn.Dropout(0.5)
        module.router.output.register_forward_pre_hook(lambda _, args: (drop(*args),))
        torch.manual_seed(noise)
        run(module, 2)
        return module.router.state_dict()

    expected = trained(1, 0)
    assert same(trained(2, 0), expected)
    assert not same(trained(1, 1), expected)


def test_an_estimator_that_returns_no_estimate_is_refused(run):
    class Plain(Perturbed):
        def __call__(self, *args):
            return super().__call__(*args).loss

    with pytest.raises(TrainingError, match=r"Plain.*Tensor.*Estimate"):
        run(make(Plain(Objective())), 1)


@pytest.mark.parametrize("estimator", ["perturbed", "straight-through", "surrogate"])
def test_mixed_precision_trains_a_float32_router(run, estimator):
    module = make(estimator)
    before = copy.deepcopy(module.router.state_dict())
    run(module, 2, precision="bf16-mixed")
    assert {p.dtype for p in module.router.parameters()} == {torch.float32}
    assert not torch.equal(before["output.weight"], module.router.state_dict()["output.weight"])


def test_a_precision_that_casts_the_router_is_refused(run):
    with pytest.raises(TrainingError, match=r"trainer\.precision=bf16-true"):
        run(make(), 1, precision="bf16-true")


def test_an_overflow_under_a_gradient_scaler_skips_the_step(run):
    scaler = GradScaler("cpu", init_scale=4.0)
    module, expected = make(Spoilt("gradient"), warmup_steps=0), make(warmup_steps=0)
    run(module, 3, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert scaler.get_scale() == 2.0
    run(expected, 3, callbacks=[stop_after(2)], plugins=[MixedPrecision("16-mixed", "cpu", GradScaler("cpu"))])
    for one, two in zip(module.router.parameters(), expected.router.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_router_is_calibrated_once_before_the_first_step(run, tmp_path, monkeypatch):
    calls, calibrate = [], BuddyRouter.calibrate
    monkeypatch.setattr(BuddyRouter, "calibrate", lambda self, probe: calls.append(probe) or calibrate(self, probe))
    module = make(calibrated=False)
    run(module, 1).save_checkpoint(tmp_path / "one.ckpt")
    (probe,) = calls
    assert (probe.count, probe.prompt, probe.layer_counts) == (len(module.trainer.datamodule.calibration), 8, (4, 3))
    assert module.start.prior.any()
    resumed = make(calibrated=False)
    run(resumed, 2, ckpt_path=tmp_path / "one.ckpt")
    assert len(calls) == 1
    assert torch.equal(resumed.start.prior, module.start.prior)


def test_what_has_nothing_to_train_is_calibrated_by_hand(run, text):
    backbone = tiny_backbone("llama")
    module = RoutingModule(RoutedLM(backbone, ShortGPT(geometry_of(backbone))), budgets=BUDGETS)
    with pytest.raises(TrainingError, match="ShortGPT"):
        run(module, 1)
    text.setup()
    module.calibrate(text)
    assert module.router.influence.any()
    with pytest.raises(TrainingError, match="full depth"):
        run(RoutingModule(make().model, budgets=[1.0]), 1)


def test_validation_and_test_log_every_budget(run):
    module = make()
    trainer = run(module, 2, limit_val_batches=1.0, val_check_interval=2, check_val_every_n_epoch=None)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert logged.keys() == {
        *("val/kl", "val/loss"),
        *(f"val/{kind}/{budget}" for kind in ("kl", "loss", "perplexity") for budget in BUDGETS),
    }
    with quiet():
        (tested,) = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).test(
            module, dataloaders=WindowBatches(trainer.datamodule.validation, 4), verbose=False
        )
    for name, value in logged.items():
        assert tested[name.replace("val/", "test/")] == value
    assert logged["val/kl"] == pytest.approx((logged["val/kl/0.75"] + logged["val/kl/0.5"]) / 2)
    assert logged["val/perplexity/0.5"] == pytest.approx(math.exp(logged["val/loss/0.5"]))
    assert logged["val/kl/1.0"] == pytest.approx(0, abs=1e-5)
    assert [s.mean_kl for s in module.scores] == pytest.approx([tested[f"test/kl/{b}"] for b in BUDGETS], abs=1e-7)


def test_training_goes_on_after_validation_in_inference_mode(run):
    """Lightning's default; nothing that was made in it may reach a gradient."""
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    plain, validated = make("straight-through"), make("straight-through")
    run(plain, 2)
    run(validated, 2, **options)
    assert same(plain.router.state_dict(), validated.router.state_dict())


@pytest.mark.parametrize("form", ["tensor", "mapping"])
def test_batches_of_other_loaders_are_taken(form, tmp_path):
    ids = torch.randint(3, 259, (5, 24), generator=torch.Generator().manual_seed(0))
    loader = DataLoader([row if form == "tensor" else {"input_ids": row} for row in ids], batch_size=2)
    module = make()
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers
        options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(max_epochs=2, log_every_n_steps=1, default_root_dir=tmp_path, **options)
        trainer.fit(module, loader, loader)
        trainer.test(module, loader, verbose=False)
    assert trainer.global_step == 6
    assert module.scores[0].tokens.tolist() == [16] * 5, "without documents each window stands for itself"


def test_objectives_are_means_over_the_micro_batches_since_the_last_point(run, monkeypatch):
    module, logged, seen = make(), {}, []
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.setdefault(name, []).append(float(value)))
    step = module.estimator

    def estimate(routed, batch, generator):
        found = step(routed, batch, generator)
        seen.append((found.objective[batch.executed == 3], len(logged.get("train/objective_3_layers", ()))))
        return found

    module.estimator = estimate
    run(module, 4, accumulate_grad_batches=3, log_every_n_steps=2)
    expected = [torch.cat([rows for rows, point in seen if point == number]).mean().item() for number in (0, 1)]
    assert len(seen) == 12
    assert logged["train/objective_3_layers"] == pytest.approx(expected, rel=1e-5)


def test_tokens_are_scored_from_position_16(run):
    seen = []

    class Noted(Perturbed):
        def __call__(self, routed, batch, generator):
            seen.append((int(batch.scored[0]), *batch.executed.tolist()))
            return super().__call__(routed, batch, generator)

    run(make(Noted(Objective()), prompt=24), 4)
    assert {first for first, *_ in seen} == {16}
    assert {count for _, *executed in seen for count in executed} == {3, 4}, "full depth is not trained on"


def test_a_resumed_training_takes_the_new_rate(run, tmp_path):
    rates = []
    note = LambdaCallback(
        on_train_batch_start=lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[1]["lr"])
    )
    run(make(lr=1.0, warmup_steps=0), 2).save_checkpoint(tmp_path / "two.ckpt")
    run(make(lr=0.1, warmup_steps=0), 4, ckpt_path=tmp_path / "two.ckpt", callbacks=[note])
    factors = [0.1 + 0.45 * (1 + math.cos(math.pi * step / 4)) for step in (2, 3)]
    assert rates == pytest.approx([0.1 * factor for factor in factors])


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_a_resumed_training_keeps_the_rates_of_a_callback_that_has_its_own(run, tmp_path):
    def save(trainer: lightning.Trainer, _: object) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(tmp_path / "two.ckpt")

    def fitted(**options: object) -> RoutingModule:
        callbacks = [StochasticWeightAveraging(1e-3, swa_epoch_start=1), LambdaCallback(on_train_epoch_end=save)]
        run(module := make(), -1, max_epochs=4, limit_train_batches=2, callbacks=callbacks, **options)
        return module

    whole, resumed = fitted(), fitted(ckpt_path=tmp_path / "two.ckpt")
    assert same(resumed.router.state_dict(), whole.router.state_dict())


def test_a_router_that_did_not_move_moved_no_layers(run):
    trainer = run(make(lr=1e-12), 1, log_every_n_steps=1)
    assert trainer.callback_metrics["train/moved_layers"] == 0
    assert trainer.callback_metrics["train/changed_plans"] == 0, "the router starts from one plan for all tokens"


def test_the_share_of_plans_that_change_is_that_of_the_gates(run):
    backbone, found = tiny_backbone("llama"), []
    router = SoundGates(geometry_of(backbone))
    nn.init.normal_(router.read)
    routed = RoutedLM(backbone, router, mean_over=64)
    module = RoutingModule(routed, budgets=BUDGETS, prompt=8, lr=1e-12, warmup_steps=0)
    module.mark_calibrated()
    step = module.estimator

    def noted(*args):
        found.append(step(*args))
        return found[-1]

    module.estimator = noted
    trainer = run(module, 1, log_every_n_steps=1)
    runs = found[0].runs
    expected = sum(float((a != b).any()) for row in runs for a, b in pairwise(row)) / (len(runs) * (runs.shape[1] - 1))
    assert 0 < expected < 1
    assert trainer.callback_metrics["train/changed_plans"] == pytest.approx(expected)


def test_windows_with_padding_or_too_long_and_batches_without_tokens_are_refused(run):
    module, loader = make(), torch.utils.data.DataLoader
    ids = torch.randint(3, 259, (2, 24))
    padded = {"input_ids": ids, "attention_mask": (torch.arange(24) < 20).long().expand(2, -1)}
    long = torch.randint(3, 259, (1, module.model.backbone.context_length + 1))
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, inference_mode=False)
    for batch in (padded, long, ids.float(), {"tokens": ids}, [ids, ids]):
        with quiet(), pytest.raises(TrainingError):
            trainer.test(module, loader([batch], batch_size=None), verbose=False)
    with quiet():
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        trainer.test(module, loader([whole], batch_size=None), verbose=False)
        expected = module.scores
        trainer.test(module, loader(torch.utils.data.TensorDataset(ids), batch_size=2), verbose=False)
    assert [each.mean_loss for each in module.scores] == [each.mean_loss for each in expected]


def test_a_validation_that_was_stopped_leaves_nothing_to_the_next(text):
    module = make()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, inference_mode=False)
    ids = torch.randint(3, 259, (2, 24))
    with quiet():
        trainer.validate(module, DataLoader([ids], batch_size=None), verbose=False)
        expected = trainer.callback_metrics["val/kl"].item()
        with pytest.raises(TrainingError):
            trainer.validate(module, DataLoader([ids + 1, ids.float()], batch_size=None), verbose=False)
        trainer.validate(module, DataLoader([ids], batch_size=None), verbose=False)
    assert trainer.callback_metrics["val/kl"].item() == expected


def test_a_second_test_sees_weights_that_were_changed_since_the_first():
    module, ids = make(), torch.randint(3, 259, (2, 24))
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, inference_mode=False)
    losses = []
    for _ in range(2):
        with quiet():
            losses += trainer.test(module, DataLoader([ids], batch_size=None), verbose=False)
        with torch.no_grad():
            module.model.backbone.layers[2].mlp.down_proj.weight.mul_(3)
    fresh = RoutingModule(module.model, budgets=BUDGETS, prompt=8)
    with quiet():
        trainer.test(module, DataLoader([ids], batch_size=None), verbose=False)
        trainer.test(fresh, DataLoader([ids], batch_size=None), verbose=False)
    assert losses[0]["test/loss/1.0"] != losses[1]["test/loss/1.0"]
    assert [each.mean_loss for each in module.scores] == [each.mean_loss for each in fresh.scores]


def test_checkpoints_load_without_a_trainer_and_resume_with_optimizers_of_ones_own(run, tmp_path):
    class Own(RoutingModule):
        def configure_optimizers(self):
            first, *rest = self.router.parameters()
            optimizer = torch.optim.AdamW([{"params": [first]}, {"params": rest}], lr=0.02)
            scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=3)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def own() -> Own:
        module = Own(make().model, budgets=BUDGETS, prompt=8)
        module.mark_calibrated()
        return module

    whole, resumed = own(), own()
    run(whole, 6)
    run(own(), 6, callbacks=[stop_after(4)]).save_checkpoint(tmp_path / "four.ckpt")
    run(resumed, 6, ckpt_path=tmp_path / "four.ckpt")
    assert same(whole.router.state_dict(), resumed.router.state_dict())
    loaded = RoutingModule.load_from_checkpoint(tmp_path / "four.ckpt", model=make().model, budgets=BUDGETS)
    assert loaded.calibrated
    assert not same(loaded.router.state_dict(), make().router.state_dict())


def test_accumulation_that_changes_is_refused(run):
    with pytest.raises(TrainingError, match="accumulate_grad_batches"):
        run(make(), 2, callbacks=[GradientAccumulationScheduler({0: 2, 1: 1})])
    assert run(make(), 2, callbacks=[GradientAccumulationScheduler({0: 2})]).global_step == 2


def test_a_step_leaves_the_random_state_of_a_shuffled_loader_alone(run):
    torch.manual_seed(5)
    expected = torch.rand(3)
    states = []
    torch.manual_seed(5)
    run(make(), 2, callbacks=[LambdaCallback(on_train_batch_start=lambda *_: states.append(torch.get_rng_state()))])
    torch.manual_seed(5)
    assert torch.equal(states[0], states[1])
    assert torch.equal(torch.rand(3), expected)


def test_the_rate_falls_over_the_steps_that_there_are(run):
    rates: list[float] = []
    note = LambdaCallback(on_train_batch_start=lambda t, *_: rates.append(t.optimizers[0].param_groups[1]["lr"]))
    loader = DataLoader(torch.randint(3, 259, (4, 24)), batch_size=1)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers
        lightning.Trainer(accelerator="cpu", max_steps=100, max_epochs=2, callbacks=[note], **off).fit(make(), loader)
    assert len(rates) == 8
    assert rates[-1] < 0.5 * max(rates)


def test_the_router_is_in_training_mode_for_training_alone(run):
    module, modes = make(), []
    module.router.eval()
    run(module, 2, callbacks=[LambdaCallback(on_train_batch_start=lambda _, m, *__: modes.append(m.router.training))])
    assert (modes, module.router.training) == ([True, True], False)


def test_no_curve_is_logged_where_the_trainer_logs_none(run):
    assert run(make(), 2, log_every_n_steps=0).global_step == 2


def test_lightning_finds_a_rate(run, text, tmp_path):
    module = make()
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    with quiet():
        trainer = lightning.Trainer(accelerator="cpu", max_steps=8, default_root_dir=tmp_path, **off)
        found = Tuner(trainer).lr_find(module, datamodule=text, num_training=16, max_lr=0.1)
    assert len(found.results["lr"]) == 16
    assert min(found.results["loss"]) > 0, "the objective, not the estimator's loss"
    assert module.lr == found.suggestion()


def test_groups_without_a_scale_have_the_recipes_rate(run):
    class Grouped(BuddyRouter):
        """Its parameters in a group without a scale."""

        def parameter_groups(self):
            return [{"params": [*self.parameters()]}]

    module = make()
    module.router.__class__ = Grouped
    assert run(module, 1, callbacks=[]).optimizers[0].param_groups[0]["initial_lr"] == module.lr
