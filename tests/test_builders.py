"""What the keys of a recipe become: settings of the model, the estimator, the modules that train."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from buddy.builders.model import build_backbone, build_model
from buddy.builders.training import build_estimator, build_healing, build_module, check_model, ignored_keys
from buddy.config import load_recipe
from buddy.engine.bridges import Bridges
from buddy.errors import RecipeError
from buddy.schema import RouterSection


@pytest.fixture
def built(small):
    """A recipe and its model: `recipe, model = built("key=value", …)`."""

    def built(*overrides):
        recipe = load_recipe(small.file, overrides)
        return recipe, build_model(recipe, build_backbone(recipe))

    return built


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("routing.policy=hole", "policy", "hole"),
        ("routing.policy=zero", "policy", "zero"),
        ("routing.pool=both", "pool", "both"),
        ("routing.reroute_every=3", "reroute_every", 3),
        ("routing.batch_plan=shared", "batch_plan", "shared"),
        ("routing.sink_tokens=2", "sink_tokens", 2),
        ("routing.prompt_plan=shared", "prompt_plan", "shared"),
    ],
)
def test_settings_of_the_model(built, override, name, value):
    _, model = built(override)
    assert getattr(model.settings, name) == value
    ids = torch.randint(3, 200, (1, 12))
    assert (model(ids, executed=torch.tensor([4])).executed[:, 2:] == 4).all()


def test_the_estimator_and_its_objective(built):
    recipe, model = built("objective={kl: 0.5, ce: 0.25, plans: 6, sigma: 0.3, shared: 0.1}")
    estimator = build_estimator(recipe, model.router)
    assert (estimator.plans, estimator.sigma, estimator.shared) == (6, 0.3, 0.1)
    assert (estimator.objective.kl, estimator.objective.ce) == (0.5, 0.25)


def test_a_straight_through_estimator_needs_every_layers_states(built):
    for estimator in ("straight-through", "surrogate"):
        recipe, model = built(f"objective.estimator={estimator}", "routing.policy=hole")
        with pytest.raises(RecipeError, match=r"routing\.policy"):
            check_model(recipe, model.backbone)
        for router in ("shortgpt", "skipgpt"):  # which it does not train
            check_model(replace(recipe, router=RouterSection(router)), model.backbone)


def groups(module, steps: int = 20) -> list[dict]:
    """The parameter groups of a module's optimizer."""
    module.trainer = SimpleNamespace(max_steps=steps, estimated_stepping_batches=steps)
    return module.configure_optimizers()["optimizer"].param_groups


def test_what_changes_nothing_in_a_run(built):
    recipe, model = built("router=shortgpt", "bridge=null")
    assert "data.train_sources" in ignored_keys(recipe, model.router)
    recipe, model = built("router=shortgpt", "bridge=null", "predictor.name=regress")
    assert "data.train_sources" not in ignored_keys(recipe, model.router), "its predictor measures on that text"
    recipe, model = built()
    assert "data.train_sources" not in ignored_keys(recipe, model.router)


def test_rates_and_weight_decay(built):
    recipe, model = built("optimizer={lr: 0.5, weight_decay: 0.25, warmup_steps: 0}")
    found = groups(build_module(recipe, model))
    assert {group["weight_decay"] for group in found} == {0.25}
    assert {group["initial_lr"] for group in found} == {0.5 * each["scale"] for each in model.router.parameter_groups()}
    recipe, model = built("bridge={rank: 4, steps: 3, lr: 0.125}", "optimizer.weight_decay=0.25")
    model.bridge(Bridges(model.geometry, 4))
    (bridges,) = groups(build_healing(recipe, model))
    assert (bridges["initial_lr"], bridges["weight_decay"]) == (0.125, 0.25)
