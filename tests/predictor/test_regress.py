"""Regression of loss curves, and the budget that they ask for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from buddy.predictor.features import feature_size, prompt_features
from buddy.predictor.regress import STRENGTHS, CurvePredictor, ridge, smallest_within
from buddy.router import Context, Geometry
from tests.routers.test_pudding import left_out

ARMS = (6, 4, 3)
GEOMETRY = Geometry(layers=6, context_layer=1, hidden=8, features=4)


def contexts(rows: int, seed: int = 0) -> Context:
    random = torch.Generator().manual_seed(seed)
    draw = lambda width: torch.randn(rows, width, generator=random)  # noqa: E731
    return Context(draw(4), draw(4), draw(8), torch.full((rows,), 6))


def linear(rows: int, seed: int = 0) -> tuple[Context, torch.Tensor]:
    """Contexts, and increases that are linear in them, the more the shallower."""
    context = contexts(rows, seed)
    features = prompt_features(context).double()
    slope = torch.randn(feature_size(GEOMETRY), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    hardness = 1 + 0.2 * features @ slope / len(slope) ** 0.5
    return context, torch.stack([0 * hardness, hardness, 2 * hardness], 1)


def test_what_is_linear_is_learned():
    predictor = CurvePredictor(feature_size(GEOMETRY), ARMS, pooled=4, epsilon=1.0)
    context, increase = linear(200)
    predictor.fit(prompt_features(context), increase)
    other, truth = linear(50, seed=1)
    torch.testing.assert_close(predictor.increase(prompt_features(other)).double(), truth, atol=0.02, rtol=0)


def test_only_what_helps_is_seen():
    """Where the pooled states say it all, the other features' noise is left out; where they say nothing, it is not."""
    for place, told in ((0, slice(0, 4)), (9, slice(0, 16))):
        predictor = CurvePredictor(feature_size(GEOMETRY), ARMS, pooled=4, epsilon=1.0)
        features = prompt_features(contexts(60))
        predictor.fit(features, features[:, place : place + 1].double() * torch.tensor([0.0, 1.0, 2.0]))
        assert bool((predictor.slope[:, told] != 0).any())
        assert bool((predictor.slope[1, 4:] != 0).any()) == (place == 9)


def test_leaving_out_is_what_it_says():
    """Every row's prediction is that of a regression which was fitted without it, at the ridge that was chosen."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=random, dtype=torch.float64)
    features = features - features.mean(0)
    targets = features[:, :2] * 2 + 0.3 * torch.randn(12, 2, generator=random, dtype=torch.float64)
    slope, level, predicted = ridge(features, targets)
    errors = []
    for strength in STRENGTHS * features.square().sum() / 12:
        errors.append((left_out(features, targets, strength) - targets).square().mean(0))
    unit = targets.var(0, correction=0)
    best = min(errors, key=lambda error: (error / unit).sum())
    assert torch.allclose((predicted - targets).square().mean(0), best, rtol=1e-6)
    assert torch.allclose(level, targets.mean(0))
    assert slope.shape == (2, 5)


def test_the_smallest_budget_within_epsilon():
    arms = torch.tensor(ARMS)
    increase = torch.tensor([[0.0, 0.04, 0.2], [0.0, 0.01, 0.05], [0.0, 0.3, 0.4], [0.1, 0.2, 0.3]])
    assert smallest_within(increase, arms, 0.05).tolist() == [4, 3, 6, 6]
    assert smallest_within(increase[:, 1:], arms[1:], 0.05).tolist() == [4, 3, 4, 4]


@given(
    st.lists(st.lists(st.floats(-1, 3), min_size=4, max_size=4), min_size=1, max_size=6),
    st.floats(0, 2),
    st.floats(0, 2),
)
def test_a_larger_epsilon_never_chooses_more(increase, one, other):
    arms = torch.tensor([9, 7, 5, 2])
    small, large = (smallest_within(torch.tensor(increase), arms, epsilon) for epsilon in sorted((one, other)))
    assert bool((large <= small).all())


@given(st.integers(3, 8), st.integers(0, 1000))
def test_a_cap_is_never_passed(most, seed):
    predictor = CurvePredictor(feature_size(GEOMETRY), ARMS, pooled=4, epsilon=0.0)
    predictor.level.copy_(torch.tensor([0.0, 1.0, 2.0]))
    chosen = predictor.chooser(most)(contexts(5, seed))
    assert chosen.dtype == torch.long
    assert chosen.tolist() == [max(arm for arm in ARMS if arm <= most)] * 5
