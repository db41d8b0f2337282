"""The Decision Module: where it starts, what it sees, and what it refuses."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy import Geometry
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from routers.buddy import BuddyRouter
from tests.routers.landscape import SIZES as LARGE
from tests.routers.landscape import Landscape, Removed, context, left_out, searched, with_pairs
from tests.tiny import tiny_backbone

SIZES = Geometry(layers=6, context_layer=1, hidden=12, features=4)


@pytest.mark.parametrize(
    ("prior", "measure"), [("block-influence", "block_influence"), ("taylor", "taylor"), ("loss", "loss_increase")]
)
def test_it_starts_at_the_order_of_its_prior(prior, measure):
    backbone = tiny_backbone()
    router = BuddyRouter(geometry_of(backbone), prior=prior)
    probe = CalibrationProbe(RoutedLM(backbone, router), torch.arange(3, 67).reshape(4, 16))
    router.calibrate(probe)
    scores = router.score(context(router.geometry, 2, 3))
    expected = getattr(probe, measure).clamp(min=0).argsort(stable=True)
    assert torch.equal(scores.argsort(stable=True), expected.expand(2, 3, -1))
    torch.testing.assert_close(router.prior.mean(1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(router.prior.std(1), torch.ones(5))


def rising(routable: int, seed: int) -> Callable[[Removed], float]:
    """A loss that a layer raises the more, the more are left out; only beside a neighbour it may cost less."""
    generator = torch.Generator().manual_seed(seed)
    alone = torch.rand(routable, generator=generator, dtype=torch.float64)
    pair = torch.rand(routable, routable, generator=generator, dtype=torch.float64).triu(1)
    neighbours = torch.rand(routable - 1, generator=generator, dtype=torch.float64)
    pair -= (1.5 * neighbours * torch.minimum(alone[1:], alone[:-1])).diag(1)
    return with_pairs(alone, pair)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), least=st.integers(2, 11), count=st.integers(1, 9))
def test_greedy_starts_at_the_sets_of_a_greedy_removal(seed, least, count):
    probe = Landscape(LARGE, rising(LARGE.routable, seed), [least], count=count)
    router = searched(BuddyRouter, probe, prior_windows=4)
    removed: list[int] = []
    for executed in range(11, least - 1, -1):
        left = [i for i in range(LARGE.routable) if i not in removed]
        removed.append(min(left, key=lambda i: probe.loss(frozenset([*removed, i]))))
        assert left_out(router, executed) == frozenset(removed)
    assert {(criterion, windows) for _, criterion, windows in probe.calls} == {("kl", min(4, count))}
    assert probe.bridged == {True}


def test_greedy_ranks_what_is_left_by_its_rise_at_this_budget():
    rises = [0.1, 5.0, 0.2, 3.0, 0.3, 4.0, 0.4, 2.0, 0.5, 6.0]
    router = searched(BuddyRouter, Landscape(LARGE, lambda removed: sum(rises[layer] for layer in removed), [9]))
    for removed in (1, 2, 3):
        order = router.prior[LARGE.routable - removed].argsort().tolist()
        assert order == [0, 2, 4, 6, 8, 7, 3, 5, 1, 9]


def test_greedy_measures_few_sets_a_round():
    probe = Landscape(LARGE, lambda removed: float(sum(2**layer for layer in removed)), [2])
    router = searched(BuddyRouter, probe)
    assert left_out(router, 5) == frozenset(range(7))
    assert sum(len(sets) for sets, *_ in probe.calls) < 10 + 2 * 9  # all in the first round, then two in each


def test_greedy_takes_a_layer_that_costs_little_once_its_neighbour_is_gone():
    def loss(removed: Removed) -> float:
        return sum(0.1 for _ in removed) + 5.0 * (4 in removed and 5 not in removed)

    router = searched(BuddyRouter, Landscape(LARGE, lambda removed: loss(removed) - 0.01 * (5 in removed), [7]))
    assert {4, 5} <= left_out(router, 7)


def awake(**options) -> BuddyRouter:
    """A router whose output depends on every weight."""
    torch.manual_seed(0)
    router = BuddyRouter(SIZES, **options)
    torch.nn.init.normal_(router.output.weight, std=3)
    return router


@pytest.mark.parametrize("part", ["pooled", "newest", "hidden"])
def test_it_sees_the_parts_that_it_is_given_and_no_other(part):
    given = context(SIZES, 5)
    changed = dataclasses.replace(given, **{part: getattr(context(SIZES, 5, seed=1), part)})
    others = [name for name in ("pooled", "newest", "hidden") if name != part]
    assert not torch.equal(awake(context=[part]).score(given), awake(context=[part]).score(changed))
    assert torch.equal(awake(context=others).score(given), awake(context=others).score(changed))


@pytest.mark.parametrize("parts", ["pooled", None, [], ["pooled", "pooled"], ["old"], {"pooled": 1}])
def test_parts_that_are_no_list_of_different_names_are_refused(parts):
    with pytest.raises(ValueError, match="context"):
        BuddyRouter(SIZES, context=parts)


def test_the_budget_is_an_input_only_with_the_option():
    few, many = (context(SIZES, 5, executed=k) for k in (3, 5))
    assert torch.equal(awake().score(few), awake().score(many))
    assert not torch.equal(awake(budget_aware=True).score(few), awake(budget_aware=True).score(many))


def test_the_bound_holds():
    free, bounded = (awake(bound=bound).score(context(SIZES, 50)) for bound in (None, 0.5))
    assert free.abs().max() > 2
    assert bounded.abs().max() <= 0.5
    assert torch.equal(free.sign(), bounded.sign())


def test_the_prior_is_added_with_its_weight():
    router = awake(prior_weight=0.7)
    router.prior.copy_(torch.arange(20.0).view(5, 4))
    executed = torch.tensor([2, 3, 5])  # of 6, of which 2 always run
    given = dataclasses.replace(context(SIZES, 3), executed=executed)
    without = awake(prior_weight=0.0).score(given)
    torch.testing.assert_close(router.score(given) - without, 0.7 * router.prior[[0, 1, 3]])


def test_a_router_with_one_prior_for_every_budget_is_read():
    router = awake()
    state = {**router.state_dict(), "prior": torch.tensor([1.0, -1.0, 0.5, -0.5])}
    router.load_state_dict(state)
    assert torch.equal(router.prior, state["prior"].expand(5, -1))
