"""What holds for every installed router."""

from functools import lru_cache
from itertools import pairwise

import pytest
import torch

from buddy import Context, Geometry, Plan, Router
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import RegistryError
from buddy.registry import build, installed, load
from tests.tiny import tiny_backbone

NAMES = [entry.name for entry in installed() if entry.value.startswith("routers.")]
SCORED = [name for name in NAMES if issubclass(load(name), Router)]  # the others decide layer by layer
WINDOWS = torch.randint(3, 259, (4, 16), generator=torch.Generator().manual_seed(0))


def made(name: str, **options) -> tuple[Router, Geometry]:
    """A calibrated router whose learned part is not at its start."""
    backbone = tiny_backbone("llama")
    geometry = geometry_of(backbone)
    torch.manual_seed(0)
    router = build(name, geometry, options)
    router.calibrate(CalibrationProbe(RoutedLM(backbone, router), WINDOWS, asked=[5, 3]))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn_like(parameter))
    return router, geometry


make = lru_cache(made)  # for tests that change nothing


def context(geometry: Geometry, *leading: int, executed: int = 4, seed: int = 0) -> Context:
    generator = torch.Generator().manual_seed(seed)
    sizes = (geometry.features, geometry.features, geometry.hidden)
    pooled, newest, hidden = (torch.randn(*leading, size, generator=generator) for size in sizes)
    return Context(pooled, newest, hidden, torch.full(leading, executed))


def test_all_are_here():
    static = {"angular", "evopress", "reverse-order", "shortened-llama", "shortgpt", "sleb", "uniform"}
    assert {"buddy", "first", "full", "pudding", "random", *static} <= {*NAMES}


@pytest.mark.parametrize("leading", [(), (3,), (3, 5)])
@pytest.mark.parametrize("name", SCORED)
def test_scores_have_the_leading_dimensions_of_the_context(name, leading):
    router, geometry = make(name)
    scores = router.score(context(geometry, *leading))
    assert scores.shape == (*leading, geometry.routable)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", SCORED)
def test_a_token_is_scored_alike_alone_and_among_others(name):
    router, geometry = make(name)
    whole = context(geometry, 3, 5)
    one = Context(*(part[1, 2] for part in (whole.pooled, whole.newest, whole.hidden, whole.executed)))
    torch.testing.assert_close(router.score(whole)[1, 2], router.score(one))


@pytest.mark.parametrize("name", SCORED)
def test_the_same_seed_gives_the_same_scores(name):
    (one, geometry), (two, _) = make(name), made(name)
    assert torch.equal(one.score(context(geometry, 2, 3)), two.score(context(geometry, 2, 3)))


@pytest.mark.parametrize("name", SCORED)
def test_the_state_dict_holds_all_that_was_learned_and_measured(name):
    router, geometry = make(name)
    other = build(name, geometry, {})
    other.load_state_dict(router.state_dict())
    assert torch.equal(router.score(context(geometry, 2, 3)), other.score(context(geometry, 2, 3)))


def nests(router: Router, geometry: Geometry) -> bool:
    depths = range(geometry.always_on, geometry.layers + 1)
    plans = [
        Plan.from_scores(router.score(context(geometry, 9, executed=k)), torch.tensor(k), geometry.layers).runs
        for k in depths
    ]
    assert all((plan.sum(-1) == k).all() for plan, k in zip(plans, depths, strict=True))
    return all(bool((less <= more).all()) for less, more in pairwise(plans))


@pytest.mark.parametrize("name", ["buddy", "full", "random", "reverse-order", "shortened-llama", "shortgpt", "sleb"])
def test_plans_nest_where_scores_do_not_depend_on_the_budget(name):
    assert nests(*make(name))


def test_plans_need_not_nest_where_scores_do():
    assert not nests(*make("uniform"))


@pytest.mark.parametrize("name", NAMES)
def test_only_a_learned_router_has_something_to_train(name):
    router, _ = make(name)
    assert router.trainable == (router.kind == "learned" and name != "pudding")  # which learns all when calibrated
    grouped = [parameter for group in router.parameter_groups() for parameter in group["params"]]
    assert {*map(id, grouped)} == {*map(id, router.parameters())}
    assert len(grouped) == len(list(router.parameters()))


BAD_OPTIONS = [
    ("buddy", {"hidden": 0}),
    ("buddy", {"hidden": "wide"}),
    ("buddy", {"hiden": 8}),
    ("buddy", {"prior": "zeno"}),
    ("buddy", {"prior_windows": 0}),
    ("buddy", {"prior_weight": -1.0}),
    ("buddy", {"bound": 0.0}),
    ("buddy", {"context": ["pooled", "later"]}),
    ("buddy", {"context": []}),
    ("buddy", {"budget_aware": 3}),
    ("evopress", {"generations": 0}),
    ("evopress", {"patience": 0}),
    ("evopress", {"survivors": [2, 1], "windows": [1]}),
    ("evopress", {"survivors": [4, 2]}),
    ("evopress", {"windows": [8, 1]}),
    ("evopress", {"windows": 8}),
    ("first", {"scope": "window"}),
    ("first", {"gates": "firm"}),
    ("first", {"penalty_weight": -1.0}),
    ("pudding", {"pool": 0}),
    ("pudding", {"windows": 0}),
    ("random", {"per": "token"}),
    ("random", {"seed": -1}),
    ("shortened-llama", {"criterion": "bleu"}),
    ("shortened-llama", {"protect": [4]}),
    ("shortened-llama", {"protect": 4}),
    ("sleb", {"windows": 0}),
]


@pytest.mark.parametrize(("name", "options"), BAD_OPTIONS)
def test_bad_options_are_refused_by_name(name, options):
    with pytest.raises(RegistryError, match=next(iter(options))):
        build(name, Geometry(layers=6, context_layer=1, hidden=12, features=4), options)
