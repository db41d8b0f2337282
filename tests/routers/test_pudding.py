"""PuDDing: its searches, its regression, its choice, and one plan per input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buddy import Context, Geometry
from buddy.calibration.probe import CalibrationProbe
from buddy.engine.model import RoutedLM, geometry_of
from routers.pudding import PuDDing, clusters, ridge
from tests.tiny import tiny_backbone

WINDOWS = torch.randint(3, 259, (12, 16), generator=torch.Generator().manual_seed(0))
SIZES = Geometry(layers=6, context_layer=1, hidden=8, features=4)


def routed(router: PuDDing | None = None, **options) -> RoutedLM:
    backbone = tiny_backbone("llama", num_hidden_layers=8)
    return RoutedLM(backbone, router or PuDDing(geometry_of(backbone), **options))


def calibrated(windows=WINDOWS, seed: int = 0, asked=(6, 4), **options) -> tuple[RoutedLM, CalibrationProbe]:
    model = routed(**options)
    probe = CalibrationProbe(model, windows, layer_counts=asked, seed=seed, prompt=8)
    model.router.calibrate(probe)
    return model, probe


def at(context: Context, executed: int) -> Context:
    return Context(context.pooled, context.newest, context.hidden, torch.full_like(context.executed, executed))


def planted() -> PuDDing:
    """Three sets whose losses hang on the first feature: below, near and above nought another one is best."""
    router = PuDDing(SIZES, pool=3)
    router.rank.copy_(torch.tensor([[0.0, 1, 2, 3], [3, 2, 1, 0], [0, 3, 1, 2]]))
    router.slope[:, :, 0] = torch.tensor([1.0, 0.0, -1.0])
    router.level.copy_(torch.tensor([0.0, -0.2, 0.0]).expand(5, -1))
    return router


def test_the_set_of_least_predicted_loss_is_chosen():
    router, generator = planted(), torch.Generator().manual_seed(0)
    pooled = torch.randn(50, 7, 4, generator=generator)
    context = Context(pooled, pooled, torch.zeros(50, 7, 8), torch.full((50, 7), 4))
    scores, predicted, chosen = router.score(context), router.predicted(context), set()
    for row in range(50):
        for t in range(7):
            x = torch.nn.functional.layer_norm(pooled[row, t], (4,))
            losses = [float(router.slope[2, p] @ x + router.level[2, p]) for p in range(3)]
            assert predicted[row, t].tolist() == pytest.approx(losses, abs=1e-5)
            chosen.add(losses.index(min(losses)))
            assert torch.equal(scores[row, t], router.rank[losses.index(min(losses))])
    assert chosen == {0, 1, 2}


def test_searches_are_greedy_on_their_windows_alone():
    model, probe = calibrated(pool=3)
    seen = torch.nn.functional.layer_norm(probe.contexts().pooled, (probe.geometry.features,))
    features = (seen - seen.mean(0)) / seen.std(0, correction=0)
    for rank, group in zip(model.router.rank, clusters(features.double(), 3, 0), strict=True):
        removed = []
        for _ in range(4):  # eight layers, of which four are asked for at least
            left = [layer for layer in range(6) if layer not in removed]
            losses = []
            for layer in left:
                runs = probe.plan_without([*removed, layer]).expand(len(group), 16, -1)
                logits = model(WINDOWS[group], runs=runs).logits[:, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS[group, 1:].flatten()))
            removed.append(left[int(torch.stack(losses).argmin())])
        assert rank.argsort()[:4].tolist() == removed


def test_losses_are_regressed_for_the_sets_of_each_k():
    model, probe = calibrated(pool=2)
    router, context = model.router, probe.contexts()
    for executed in probe.layer_counts:
        removed = [rank.argsort()[: 8 - executed].tolist() for rank in router.rank]
        losses = probe.losses(torch.stack([probe.plan_without(layers) for layers in removed])).T
        predicted = router.predicted(at(context, executed))
        assert predicted.mean(0).tolist() == pytest.approx((losses.mean(0) - losses.mean()).tolist(), abs=1e-5)
    for k, nearest in ((8, 6), (7, 6), (5, 6), (3, 4), (2, 4)):  # of two as near, the deeper
        assert torch.equal(router.predicted(at(context, k)), router.predicted(at(context, nearest)))


def least_squares(features, targets, strength):
    """Slope and level by the normal equations, the level not shrunk."""
    wide = torch.cat([features, torch.ones(len(features), 1, dtype=features.dtype)], 1)
    shrink = torch.eye(wide.shape[1], dtype=features.dtype) * strength
    shrink[-1, -1] = 0
    return torch.linalg.solve(wide.T @ wide + shrink, wide.T @ targets)


def left_out(features, targets, strength):
    """(N, P) predictions for each row by a regression without it."""
    rows = []
    for row in range(len(features)):
        kept = [other for other in range(len(features)) if other != row]
        fitted = least_squares(features[kept], targets[kept], strength)
        rows.append(torch.cat([features[row], features.new_ones(1)]) @ fitted)
    return torch.stack(rows)


def test_the_ridge_is_the_one_with_the_least_leave_one_out_error():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    features -= features.mean(0)
    targets = features[:, :2] + 0.5 * torch.randn(12, 2, generator=generator, dtype=torch.float64)
    variance, errors = features.square().sum() / 12, {}
    for power in range(-3, 4):
        errors[power] = (left_out(features, targets, variance * 10.0**power) - targets).square().mean().item()
    best = min(errors, key=errors.get)
    slope, level = ridge(features, targets)
    expected = least_squares(features, targets, variance * 10.0**best)
    torch.testing.assert_close(torch.cat([slope.T, level[None]]), expected)


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 9))
def test_groups_take_every_window_once_and_are_of_like_size(rows, count, seed):
    features = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)).double()
    groups = clusters(features, count, seed)
    assert sorted(row for group in groups for row in group) == list(range(rows))
    sizes = [len(group) for group in groups]
    assert len(groups) == min(count, rows)
    assert max(sizes) - min(sizes) <= 1
    assert groups == clusters(features, count, seed)


def test_decode_never_changes_the_plan_and_prompts_have_their_own():
    model, _ = calibrated(pool=3)
    router = model.router
    router.slope.copy_(torch.randn(router.slope.shape, generator=torch.Generator().manual_seed(0)))
    router.level.zero_()
    with model.at(executed=[4]) as record:
        model.backbone.model.generate(WINDOWS[:, :8], max_new_tokens=5, do_sample=False, pad_token_id=0)
    runs = torch.cat(record.runs, 1)
    assert all(len(row[1:].unique(dim=0)) == 1 for row in runs), "but for the sink"
    assert len(runs[:, -1].unique(dim=0)) > 1
    window = model(WINDOWS, executed=torch.full((12,), 4), prompt=8).runs
    assert torch.equal(window[:, -1], runs[:, -1])


def test_few_windows_and_no_budget_below_one_are_enough():
    model, _ = calibrated(WINDOWS[:2], pool=4, asked=())
    assert torch.equal(model.router.rank[:2], model.router.rank[2:])
    assert model(WINDOWS[:2], executed=torch.tensor([3, 5]), prompt=8).runs[:, -1].sum(-1).tolist() == [3, 5]
