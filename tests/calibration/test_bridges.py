"""Bridges in closed form, against regression by a library and against what they should improve."""

import pytest
import torch
from torch.nn import functional as F

from buddy import Context
from buddy.calibration.bridges import fit_bridges
from buddy.engine.model import RoutedLM
from tests.engine.reference import Fickle, FickleGates, routed_tiny

WINDOWS = torch.randint(3, 259, (16, 40), generator=torch.Generator().manual_seed(2))


def states(routed: RoutedLM, layer: int, **request) -> torch.Tensor:
    """(B, T, D) as they enter a layer."""
    seen = []
    hook = routed.backbone.layers[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            routed(WINDOWS, **request)
    finally:
        hook.remove()
    return seen[0]


def test_the_first_bridge_solves_the_ridge_regression():
    routed = routed_tiny()
    runs = routed(WINDOWS, executed=torch.full((16,), 4)).runs
    bridges = fit_bridges(routed, WINDOWS, [4], rank=64, ridge=0.1)
    skipped = ~runs[..., 1]
    before, after = states(routed, 1)[skipped], states(routed, 2)[skipped]
    x = torch.cat([F.layer_norm(before, (64,)), torch.ones(len(before), 1)], 1).double()
    # Ridge regression is least squares with one more row for each weight, and none for the bias.
    share = after.double().square().mean(1, keepdim=True) ** -0.5
    rows = torch.cat([share.sqrt() * x, (0.1 * share.sum()).sqrt() * torch.eye(64, 65, dtype=torch.float64)])
    wanted = torch.cat([share.sqrt() * (after - before).double(), torch.zeros(64, 64, dtype=torch.float64)])
    expected = x @ torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    torch.testing.assert_close(bridges(1, before).double(), before + expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("router", [Fickle, FickleGates])
def test_they_bring_the_routed_states_nearer_to_the_dense_ones(router):
    routed = routed_tiny(router=router)
    executed = torch.tensor([3, 4, 5, 4] * 4)
    target = states(routed, 5)
    far = (states(routed, 5, executed=executed) - target).square().mean()
    routed.bridge(fit_bridges(routed, WINDOWS, [3, 4, 5, 4], rank=16, ridge=0.1, batch_size=3))
    near = (states(routed, 5, executed=executed) - target).square().mean()
    assert near < 0.8 * far


def test_a_higher_rank_fits_closer():
    routed, errors = routed_tiny(), []
    target = states(routed, 2)
    skipped = ~routed(WINDOWS, executed=torch.full((16,), 3)).runs[..., 1]
    for rank in (1, 8, 64):
        bridges = fit_bridges(routed, WINDOWS, [3], rank=rank, ridge=0.01)
        errors.append((bridges(1, states(routed, 1)) - target)[skipped].square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0]


def test_windows_with_few_tokens_give_no_bridges():
    routed = routed_tiny()
    assert not fit_bridges(routed, WINDOWS[:1], [3], rank=4, ridge=0.3).fitted.any()
    fitted = fit_bridges(routed, WINDOWS, [3], rank=4, ridge=0.3).fitted
    assert fitted[1:5].all()
    assert not fitted[[0, 5]].any()


class SkipsThird(Fickle):
    """Always skips layer 3 first."""

    def score(self, context: Context) -> torch.Tensor:
        return torch.tensor([1.0, 2.0, 0.0, 3.0]).expand(*context.executed.shape, -1)


@pytest.mark.parametrize("layer", [1, 2, 4])
def test_a_layer_that_no_token_skips_has_a_bridge_from_all_of_them(layer):
    routed = routed_tiny(router=SkipsThird)
    bridges = fit_bridges(routed, WINDOWS, [5], rank=16, ridge=0.1)
    target = states(routed, layer + 1)[:, 1:]
    routed.bridge(bridges)
    before = states(routed, layer, executed=torch.full((16,), 5))[:, 1:]
    assert (bridges(layer, before) - target).square().mean() < 0.9 * (before - target).square().mean()


def test_the_same_for_any_batch_size():
    one, other = (fit_bridges(routed_tiny(), WINDOWS, [3, 5], rank=8, ridge=0.3, batch_size=size) for size in (4, 16))
    hidden = torch.randn(50, 64)
    for layer in range(1, 5):
        torch.testing.assert_close(one(layer, hidden), other(layer, hidden), atol=1e-3, rtol=1e-3)


class Noisy(Fickle):
    """Scores with noise in training, as dropout makes it."""

    def score(self, context: Context) -> torch.Tensor:
        scores = super().score(context)
        return scores + torch.randn_like(scores) if self.training else scores


def test_plans_are_those_of_evaluation():
    routed = routed_tiny(router=Noisy)
    routed.router.train()
    one, two = (fit_bridges(routed, WINDOWS, [3], rank=4, ridge=0.3) for _ in range(2))
    assert torch.equal(one.bias, two.bias)
    assert routed.router.training


def test_they_do_not_depend_on_how_a_batch_plans():
    plans = ("row", "shared")
    one, two = (fit_bridges(routed_tiny(batch_plan=plan), WINDOWS, [3], rank=4, ridge=0.3) for plan in plans)
    assert torch.equal(one.up, two.up)


def test_a_cut_bridge_keeps_the_mean():
    routed, means = routed_tiny(), []
    skipped = ~routed(WINDOWS, executed=torch.full((len(WINDOWS),), 4)).runs[..., 1]
    before, after = states(routed, 1)[skipped], states(routed, 2)[skipped]
    share = after.square().mean(1, keepdim=True) ** -0.5
    for rank in (2, 64):
        added = fit_bridges(routed, WINDOWS, [4], rank=rank, ridge=0.1)(1, before) - before
        means.append((share * added).sum(0) / share.sum())
    torch.testing.assert_close(*means, atol=1e-3, rtol=1e-3)
