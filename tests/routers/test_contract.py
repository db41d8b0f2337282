"""What holds for every installed router, beside the checks of `buddy.testing` (tests/testing)."""

from functools import lru_cache

import pytest
import torch

from buddy import Geometry, Plan, Router
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import RegistryError
from buddy.registry import build, installed
from tests.routers.landscape import context
from tests.tiny import tiny_backbone

NAMES = [entry.name for entry in installed() if entry.value.startswith("routers.")]


@lru_cache
def made(name: str) -> Router:
    """A calibrated router whose learned part is not at its start."""
    backbone = tiny_backbone()
    router = build(name, geometry_of(backbone), {})
    router.calibrate(
        CalibrationProbe(RoutedLM(backbone, router), torch.arange(3, 67).reshape(4, 16), layer_counts=[5, 3])
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn_like(parameter))
    return router


@pytest.mark.parametrize(
    "name", ["buddy", "full", "random", "reverse-order", "shortened-llama", "shortgpt", "sleb", "uniform"]
)
def test_plans_nest_where_scores_do_not_depend_on_the_budget(name):
    router, nested = made(name), True
    sizes, less = router.geometry, torch.zeros(9, router.geometry.layers, dtype=torch.bool)
    for k in range(sizes.always_on, sizes.layers + 1):
        plans = Plan.from_scores(router.score(context(sizes, 9, executed=k)), torch.tensor(k), sizes.layers).runs
        assert (plans.sum(-1) == k).all()
        nested, less = nested and bool((less <= plans).all()), plans
    assert nested == (name != "uniform")


@pytest.mark.parametrize("name", NAMES)
def test_only_a_learned_router_has_something_to_train(name):
    router = made(name)
    calibrated_alone = name in ("pudding", "dr-llm")  # which learn all when calibrated
    assert router.trainable == (router.kind == "learned" and not calibrated_alone)


BAD_OPTIONS = [
    ("buddy", {"hidden": 0}),
    ("buddy", {"hidden": "wide"}),
    ("buddy", {"hiden": 8}),
    ("buddy", {"prior": "zeno"}),
    ("buddy", {"prior_windows": 0}),
    ("buddy", {"prior_weight": -1.0}),
    ("buddy", {"bound": 0.0}),
    ("buddy", {"budget_aware": 3}),
    ("dr-llm", {"simulations": 3}),
    ("dr-llm", {"windows": 0}),
    ("dr-llm", {"hidden": 0}),
    ("evopress", {"generations": 0}),
    ("evopress", {"patience": 0}),
    ("evopress", {"survivors": [2, 1], "windows": [1]}),
    ("evopress", {"survivors": [4, 2]}),
    ("evopress", {"windows": [8, 1]}),
    ("evopress", {"windows": 8}),
    ("first", {"scope": "window"}),
    ("first", {"gates": "firm"}),
    ("first", {"penalty_weight": -1.0}),
    ("flexidepth", {"bottleneck": 1}),
    ("flexidepth", {"penalty_weight": -1.0}),
    ("mindskip", {"penalty_weight": -1.0}),
    ("mindskip", {"slack": -1.0}),
    ("pudding", {"pool": 0}),
    ("pudding", {"windows": 0}),
    ("random", {"per": "token"}),
    ("random", {"seed": -1}),
    ("shortened-llama", {"criterion": "bleu"}),
    ("shortened-llama", {"protect": [4]}),
    ("shortened-llama", {"protect": 4}),
    ("skipgpt", {"temperature": 0.0}),
    ("skipgpt", {"slack": -1.0}),
    ("sleb", {"windows": 0}),
    ("routers.token_table:TokenTable", {"rows": 0}),
]


@pytest.mark.parametrize(("name", "options"), BAD_OPTIONS)
def test_bad_options_are_refused_by_name(name, options):
    with pytest.raises(RegistryError, match=next(iter(options))):
        build(name, Geometry(layers=6, context_layer=1, hidden=12, features=4), options)
