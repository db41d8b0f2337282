"""The LightningModule of healing: what it trains, draws, saves and refuses."""

import copy

import pytest
import torch
from torch.nn import functional as F

from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import TrainingError
from buddy.losses import Objective
from buddy.metrics.perplexity import Reference
from buddy.training.estimators import Perturbed, StraightThrough, Surrogate, TrainingBatch, Weighted
from buddy.training.healing import HealingModule
from routers.buddy import BuddyRouter
from routers.first import FiRST
from tests.adapted import IDS, factors, new_adapter, stirred
from tests.engine.reference import Fickle, FickleGates, random_bridges, routed_tiny
from tests.tiny import tiny_backbone
from tests.training.stopping import same

pytestmark = pytest.mark.slow

GRID, BUDGETS = [6, 4, 3], [1.0, 0.75, 0.5]
SETTINGS = {"prompt": 8, "lr": 1e-2, "warmup_steps": 2}


def make(router=Fickle, policy="fill", adapter=None, **settings):
    backbone = tiny_backbone("llama")
    torch.manual_seed(0)
    routed = RoutedLM(backbone, router(geometry_of(backbone)), policy=policy)
    routed.adapter = new_adapter(backbone, **(adapter or {}))
    routed.adapter.train()
    if "estimator" not in settings:
        routed.router.requires_grad_(False)
    return HealingModule(routed, budgets=BUDGETS, **{**SETTINGS, **settings})


def batch(*executed: int) -> TrainingBatch:
    return TrainingBatch(IDS[: len(executed)], torch.tensor(executed), torch.arange(7, 19), prompt=8)


def test_the_loss_is_the_objective_against_the_stock_model():
    module = make(objective=Objective(0.7, 0.3))
    stirred(module.model.adapter)
    loss, value = module._healing(batch(3, 6))
    routed = module.model
    logits = routed(IDS[:2], executed=torch.tensor([3, 6])).logits[:, 7:19]
    stock = tiny_backbone("llama").model(IDS[:2]).logits[:, 7:19].log_softmax(-1)
    kl = (stock.exp() * (stock - logits.log_softmax(-1))).sum(-1)
    ce = F.cross_entropy(logits.flatten(0, 1), IDS[:2, 8:20].flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(value, (0.7 * kl + 0.3 * ce).mean(1).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, value.mean())


def test_the_rows_of_a_batch_have_plans_of_their_own():
    module = make()
    own = module._healing(batch(3, 4, 3))[1]
    with module.model.changed(batch_plan="shared"):
        assert torch.equal(module._healing(batch(3, 4, 3))[1], own)


@pytest.mark.parametrize(
    ("router", "policy"), [(Fickle, "fill"), (FickleGates, "fill"), (FickleGates, "hole"), (Fickle, "zero")]
)
def test_steps_on_a_batch_bring_its_routed_outputs_near_to_the_stock_model(router, policy):
    module, asked = make(router, policy=policy), batch(3, 4, 3)
    optimizer, losses = torch.optim.AdamW(module.model.adapter.parameters(), lr=3e-2), []
    for _ in range(3):
        loss, _ = module._healing(asked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("router", [BuddyRouter, FickleGates])
def test_only_the_adapter_is_trained(run, router):
    module = make(router)
    before = copy.deepcopy(module.model.router.state_dict()), factors(module.model.adapter)
    run(module, 2)
    assert same(before[0], module.model.router.state_dict())
    assert all(not torch.equal(before[1][name], value) for name, value in factors(module.model.adapter).items())
    assert not any(parameter.grad is not None for parameter in module.model.router.parameters())
    module.model.detach()
    stock = tiny_backbone("llama").model.state_dict()
    assert same(stock, module.model.backbone.model.state_dict())


class Seen(Objective):
    """Remembers what each step was judged on."""

    def __init__(self) -> None:
        super().__init__()
        self.targets = []

    def __call__(self, dense, logits, targets):
        self.targets.append(targets)
        return super().__call__(dense, logits, targets)


def test_all_routers_get_the_same_windows_budgets_and_first_factors(run, monkeypatch):
    forward, seen, asked = RoutedLM.forward, [], []

    def spied(self, *args, **options):
        asked.append(options["executed"])
        return forward(self, *args, **options)

    monkeypatch.setattr(RoutedLM, "forward", spied)
    for router in (FickleGates, BuddyRouter):
        module = make(router, objective=Seen())
        start = factors(module.model.adapter)
        asked.clear()
        run(module, 3)
        seen.append([torch.stack(module.objective.targets), torch.stack(asked), *start.values()])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*seen, strict=True))
    assert {*seen[0][1].flatten().tolist()} == {*GRID}, "every budget of the grid, full depth too"


def test_dropout_acts_in_training_alone_and_is_drawn_from_the_seed(run):
    module = make(adapter={"dropout": 0.5})
    stirred(module.model.adapter)
    values = [module._healing(batch(3, 4))[1] for _ in range(2)]
    assert not torch.equal(*values)
    module.model.adapter.freeze()
    values = [module._healing(batch(3, 4))[1] for _ in range(2)]
    assert torch.equal(*values)
    trained = []
    for salt in range(2):
        module = make(adapter={"dropout": 0.5})
        torch.manual_seed(salt)
        run(module, 3)
        trained.append(factors(module.model.adapter))
    assert same(*trained)


class OfOnesOwn:
    """An estimator of a plug-in, forward only."""

    def __init__(self, objective):
        self.perturbed = Perturbed(objective)

    def __call__(self, routed, batch, generator):
        return self.perturbed(routed, batch, generator)


ESTIMATORS = [
    (BuddyRouter, Perturbed),
    (BuddyRouter, OfOnesOwn),
    (BuddyRouter, StraightThrough),
    (BuddyRouter, Surrogate),
    (FiRST, Weighted),
]


@pytest.mark.parametrize(("router", "estimator"), ESTIMATORS)
def test_jointly_router_and_adapter_both_learn(run, router, estimator):
    module = make(router, estimator=estimator(Objective()), router_lr=1e-2)
    before = copy.deepcopy(module.router.state_dict()), factors(module.model.adapter)
    run(module, 3)
    changed = [name for name, value in module.router.state_dict().items() if not torch.equal(before[0][name], value)]
    assert {name for name, _ in module.router.named_parameters()} == {*changed}
    assert all(not torch.equal(before[1][name], value) for name, value in factors(module.model.adapter).items())
    rates = [group["initial_lr"] for group in module.trainer.optimizers[0].param_groups]
    assert rates == [1e-2, *(1e-2 * group["scale"] for group in module.router.parameter_groups())]


def test_jointly_gates_leave_full_depth_to_the_adapter():
    module = make(FiRST, estimator=Weighted(Objective()), router_lr=1e-2)
    stirred(module.model.adapter)
    loss, value = module._joint(batch(6, 3, 6), torch.Generator().manual_seed(0))
    alone = [module._healing(batch(6, 6, 6))[1][row] for row in (0, 2)]
    torch.testing.assert_close(value[[0, 2]], torch.stack(alone))
    assert value.min() > 0
    below = module.estimator(module.model, batch(6, 3, 6), torch.Generator().manual_seed(0)).loss
    torch.testing.assert_close(loss, (below + sum(alone)) / 3)


def test_jointly_the_dense_reference_is_the_stock_model():
    module = make(BuddyRouter, estimator=Perturbed(Objective()), router_lr=1e-2)
    seen = []

    class Reference(Objective):
        def __call__(self, dense, logits, targets):
            seen.append(dense.probability)
            return super().__call__(dense, logits, targets)

    module.objective = module.estimator.objective = Reference()
    stirred(module.model.adapter)
    module._joint(batch(3, 4), torch.Generator().manual_seed(0))
    stock = tiny_backbone("llama").model(IDS[:2]).logits[:, 7:19].softmax(-1)
    assert len(seen) == 5
    for probability in seen:
        torch.testing.assert_close(probability, stock)


def test_a_checkpoint_has_the_adapter_alone_and_the_recipes_rate_holds_over_its_own(run, tmp_path):
    module = make()
    run(module, 2).save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)
    assert {*saved["state_dict"]} == {f"parts.{name}" for name in factors(module.model.adapter)}
    resumed = make(lr=3e-3)
    run(resumed, 4, ckpt_path=tmp_path / "two.ckpt")
    assert resumed.trainer.optimizers[0].param_groups[0]["initial_lr"] == 3e-3


@pytest.mark.parametrize("other", [{"rank": 2}, {"targets": ["q_proj"]}])
def test_a_checkpoint_of_another_healing_is_refused(run, tmp_path, other):
    run(make(adapter=other), 1).save_checkpoint(tmp_path / "one.ckpt")
    module = make()
    before = factors(module.model.adapter)
    with pytest.raises(TrainingError, match=r"parts\.model-layers-1-mlp-down_proj\.A\.weight"):
        run(module, 2, ckpt_path=tmp_path / "one.ckpt")
    assert same(before, factors(module.model.adapter))


def test_a_loss_that_is_not_finite_stops_before_the_step_and_says_what_to_do(run):
    module = make()
    next(iter(module.model.adapter.parts.values()))["A"].weight.data[0, 0] = float("inf")
    before = factors(module.model.adapter)
    with pytest.raises(TrainingError, match=r"step 1.*adapter\.lr.*ckpt_path"):
        run(module, 2)
    assert same(before, factors(module.model.adapter))


@pytest.mark.parametrize("joint", [{"estimator": Perturbed(Objective()), "router_lr": 1e-2}, {}])
def test_the_stock_model_runs_once_a_step(joint):
    module, passes = make(**joint), []
    module.model.backbone.base.register_forward_pre_hook(lambda *_: passes.append(module.model.adapter._is_off))
    module._joint(batch(3, 4), torch.Generator()) if joint else module._healing(batch(3, 4))
    assert sum(passes) == 1


def test_trainings_on_the_same_windows_share_what_the_stock_model_gives():
    reference, outcomes, passes = Reference(), [], []
    for shared in (reference, reference, None):
        module = make(reference=shared)
        module.model.backbone.base.register_forward_pre_hook(
            lambda *_, module=module: passes.append(module.model.adapter._is_off)
        )
        loss, value = module._healing(batch(3, 4))
        loss.backward()
        outcomes.append([value, *(each.grad for each in module.model.adapter.parameters())])
    assert sum(passes) == 2
    for each in outcomes[1:]:
        assert all(map(torch.equal, each, outcomes[0]))


def test_cross_entropy_alone_needs_no_dense_pass(monkeypatch):
    module = make(objective=Objective(0.0, 1.0))
    monkeypatch.setattr(Reference, "dense", lambda *_: pytest.fail("the dense model ran"))
    module._healing(batch(3, 4))[0].backward()
    assert all(parameter.grad is not None for parameter in module.model.adapter.parameters())


@pytest.mark.parametrize("prompt", [0, -3, 99])
def test_a_prompt_that_is_no_part_of_a_window_is_refused(run, prompt):
    with pytest.raises(TrainingError, match="prompt"):
        run(make(prompt=prompt), 1)


def test_bridges_alone_are_not_trained_at_full_depth(run):
    routed, asked = routed_tiny(), []
    routed.bridge(random_bridges(routed.geometry, 0))
    module = HealingModule(routed, budgets=[1.0, 0.75, 0.5], prompt=8, lr=1e-3, bridge_lr=1e-3)
    healing = module._healing
    module._healing = lambda batch: asked.extend(batch.executed.tolist()) or healing(batch)
    run(module, 2)
    assert set(asked) == {3, 4}


def test_budgets_that_round_to_one_count_are_drawn_once(run):
    drawn = []
    for budgets in ([1.0, 0.75, 0.55, 0.5], BUDGETS):
        module, asked = make(), []
        module = HealingModule(module.model, budgets=budgets, **SETTINGS)
        healing = module._healing
        module._healing = lambda batch, asked=asked, healing=healing: asked.append(batch.executed) or healing(batch)
        run(module, 4)
        drawn.append(torch.cat(asked).tolist())
    assert drawn[0] == drawn[1]
    assert {*drawn[0]} == {*GRID}
