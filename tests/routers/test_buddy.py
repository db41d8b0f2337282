"""The Decision Module: where it starts, what it sees, and what it refuses."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from buddy import Geometry
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from routers.buddy import BuddyRouter
from tests.routers.landscape import Landscape, context, left_out, rugged, searched
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
    assert router.prior.mean().item() == pytest.approx(0, abs=1e-6)
    assert router.prior.std().item() == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), least=st.integers(2, 5), count=st.integers(1, 9))
def test_greedy_starts_at_the_sets_of_a_greedy_removal(seed, least, count):
    probe = Landscape(SIZES, rugged(SIZES.routable, seed), [least], count=count)
    router = searched(BuddyRouter, probe, prior_windows=4)
    removed: list[int] = []
    for executed in range(5, least - 1, -1):
        left = [i for i in range(SIZES.routable) if i not in removed]
        removed.append(min(left, key=lambda i: probe.loss(frozenset([*removed, i]))))
        assert probe.bridged[len(removed) - 1] == frozenset(removed[:-1])
        assert left_out(router, executed) == frozenset(removed)
    assert {(criterion, windows) for _, criterion, windows in probe.calls} == {("kl", min(4, count))}


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
    router.prior.copy_(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    without = awake(prior_weight=0.0).score(context(SIZES, 3))
    torch.testing.assert_close(router.score(context(SIZES, 3)) - without, 0.7 * router.prior.expand(3, -1))
