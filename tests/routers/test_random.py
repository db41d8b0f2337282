"""Random orders: one for the run, or one for each input."""

import pytest
import torch

from buddy import Context, Geometry, Plan
from buddy.engine.model import RoutedLM, geometry_of
from routers.random import RandomRouter
from tests.routers.landscape import Landscape, context
from tests.tiny import tiny_backbone

SIZES = Geometry(layers=30, context_layer=1, hidden=64, features=32)


def scores(router: RandomRouter, recipe: int | None = None) -> torch.Tensor:
    if recipe is not None:
        router.calibrate(Landscape(SIZES, seed=recipe))
    return router.score(context(SIZES, 5))


@pytest.mark.parametrize("per", ["run", "input"])
def test_the_seed_is_the_recipes_or_its_own(per):
    assert torch.equal(scores(RandomRouter(SIZES, per=per), 0), scores(RandomRouter(SIZES, per=per), 0))
    assert not torch.equal(scores(RandomRouter(SIZES, per=per), 0), scores(RandomRouter(SIZES, per=per), 1))
    assert torch.equal(scores(RandomRouter(SIZES, per=per, seed=4), 0), scores(RandomRouter(SIZES, per=per, seed=4), 1))
    assert torch.equal(scores(RandomRouter(SIZES, per=per, seed=4)), scores(RandomRouter(SIZES, per=per), 4))


def plans(router: RandomRouter, seen: Context) -> torch.Tensor:
    return Plan.from_scores(router.score(seen), seen.executed, SIZES.layers).runs


def test_each_input_has_an_order_of_its_own():
    seen = context(SIZES, 400, executed=16)
    found = plans(RandomRouter(SIZES, per="input"), seen)
    assert len({tuple(plan) for plan in found.tolist()}) == 400
    # As unrelated sets of 14 from 28 do, two plans share half of their layers on average.
    routable = found[:, 1:-1].double()
    shared = (routable[:-1] * routable[1:]).sum(-1).mean()
    assert shared.item() == pytest.approx(7, abs=0.3)
    assert routable.mean(0).sub(0.5).abs().max() < 0.12, "no layer is preferred"


def test_an_order_for_each_input_is_held_while_decoding():
    backbone = tiny_backbone("llama")
    routed = RoutedLM(backbone, RandomRouter(geometry_of(backbone), per="input"))
    tokens = torch.randint(3, 259, (1, 12), generator=torch.Generator().manual_seed(0))
    with routed.at(0.5) as record:
        backbone.model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    runs = torch.cat([ran.runs for ran in record.forwards], 1)[0, routed.sink_tokens :]
    assert len(runs) >= 12
    assert (runs == runs[0]).all()
    with routed.at(0.5) as again:
        backbone.model(tokens.repeat(3, 1))
    assert (again.forwards[0].runs[:, 1:] == runs[0]).all(), "in a batch the same plan"
