"""Estimators: what they return, and that they lead downhill."""

import pytest
import torch
from torch import Tensor, nn

from buddy import Context, Geometry, Router
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import RegistryError
from buddy.losses import Objective
from buddy.plan import top_k
from buddy.training.estimators import Perturbed, StraightThrough, Surrogate, TrainingBatch, _direction, estimator_for
from tests.tiny import tiny_backbone

IDS = torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(0))


class Bias(Router):
    """One trainable score a layer, or one a layer and position where `positions` are 24."""

    kind = "learned"

    def __init__(self, geometry: Geometry, positions: int = 1) -> None:
        super().__init__(geometry)
        self.bias = nn.Parameter(torch.zeros(positions, geometry.routable))

    def score(self, context: Context) -> Tensor:
        return self.bias.expand(*context.executed.shape, -1)


def tiny(positions: int = 1, **options) -> RoutedLM:
    backbone = tiny_backbone("llama")
    return RoutedLM(backbone, Bias(geometry_of(backbone), positions), **options)


def batch(*executed: int) -> TrainingBatch:
    return TrainingBatch(IDS[: len(executed)], torch.tensor(executed), torch.arange(4, 23), prompt=5)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ESTIMATORS = {
    "perturbed": lambda: Perturbed(Objective(), plans=4, sigma=1.0),
    "straight-through": lambda: StraightThrough(Objective()),
    "surrogate": lambda: Surrogate(Objective(), sigma=1.0),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("prompt_plan", ["token", "shared"])
def test_an_estimate_moves_the_router_alone(name, prompt_plan):
    routed = tiny(prompt_plan=prompt_plan)
    estimate = ESTIMATORS[name]()(routed, batch(3, 4, 6, 3), generator())
    estimate.loss.backward()
    assert routed.router.bias.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in routed.backbone.model.parameters())
    assert estimate.objective.shape == (4,)
    assert estimate.objective[2] == pytest.approx(0, abs=1e-5)
    assert (estimate.objective[[0, 1, 3]] > 0.01).all()


@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
def test_perturbed_equals_its_formula(shared):
    routed, estimator = tiny(), Perturbed(Objective(), plans=4, sigma=0.7, shared=shared)
    given = batch(3, 4)
    estimate = estimator(routed, given, generator(5))
    estimate.loss.backward()
    draws = generator(5)
    own, common = torch.randn(2, 2, 24, 4, generator=draws), torch.randn(2, 2, 1, 4, generator=draws)
    noise = (1 - shared) ** 0.5 * own + shared**0.5 * common
    dense = routed.dense(given.input_ids).log_softmax(-1)[:, given.scored]
    values, plans = [], []
    for tried in (noise[0], -noise[0], noise[1], -noise[1]):
        runs = routed.plan(0.7 * tried, given.executed)
        plans.append(runs[:, given.scored, 1:-1].float())
        logits = routed(given.input_ids, runs=runs).logits.log_softmax(-1)[:, given.scored]
        values.append((dense.exp() * (dense - logits)).sum(-1))
    values, plans = torch.stack(values), torch.stack(plans)
    credit = (values - values.mean(0)) / (values.std(0).mean(-1, keepdim=True) + 1e-6)
    told = (plans - plans.mean(0)) * 2 * (2 / torch.pi) ** 0.5
    direction = (credit[..., None] * told).mean(0) / 0.7
    torch.testing.assert_close(routed.router.bias.grad[0], direction.mean((0, 1)), atol=1e-4, rtol=1e-3)


def test_plans_tell_what_the_noise_did_with_less_spread():
    """On a known loss: the same direction as crediting the noise itself, from estimates that vary less."""
    lost, sigma, generator_ = torch.tensor([0.1, 0.5, 0.3, 0.2, 0.05, 0.4]), 0.3, generator(1)
    noise = torch.randn(4000, 2, 6, generator=generator_)
    noise = torch.stack([noise, -noise], 1).flatten(1, 2).transpose(0, 1)  # (M, tokens, R)
    runs = top_k(torch.linspace(0, 0.5, 6) + sigma * noise, torch.tensor(3))
    values = (lost * ~runs).sum(-1) + 0.02 * torch.randn(runs.shape[:-1], generator=generator_)
    told = _direction(values[:, None], runs[:, None], sigma)[0]
    credit = (values - values.mean(0)) / (values.std(0).mean() + 1e-6)
    plain = (credit[..., None] * noise).mean(0) / sigma
    assert nn.functional.cosine_similarity(told.mean(0), plain.mean(0), dim=0) > 0.98
    spread = [(each.std(0).norm() / each.mean(0).norm()).item() for each in (told, plain)]
    assert spread[0] < 0.8 * spread[1]
    assert told.sum(-1).abs().max() < 1e-4


@pytest.mark.slow
def test_perturbed_points_downhill():
    """The averaged estimate finds the layer that is missed least, by brute force over layers."""
    routed = tiny()
    for seed in range(40):
        estimator = Perturbed(Objective(), plans=4, sigma=1.0, shared=1.0)
        estimator(routed, batch(5, 5, 5, 5), generator(seed)).loss.backward()
    dense = routed.dense(IDS).log_softmax(-1)[:, 4:23]
    harm = torch.zeros(4)
    for skipped in range(4):
        runs = torch.ones(4, 24, 6, dtype=torch.bool)
        runs[..., 1 + skipped] = False
        logits = routed(IDS, runs=runs).logits.log_softmax(-1)[:, 4:23]
        harm[skipped] = (dense.exp() * (dense - logits)).sum(-1).mean()
    assert (-routed.router.bias.grad[0]).argsort().tolist() == harm.argsort().tolist()


def gated(routed: RoutedLM, given: TrainingBatch, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (B, T, L) of the scores' plan, and the KL (B,) of each row with them in place."""
    runs = routed.plan(scores, given.executed)
    gates = runs.float().requires_grad_()
    dense = routed.dense(given.input_ids)[:, given.scored].log_softmax(-1)
    logits = routed(given.input_ids, runs=runs, gates=gates, logits_to_keep=given.scored).logits.log_softmax(-1)
    return gates, (dense.exp() * (dense - logits)).sum(-1).mean(1)


@pytest.mark.parametrize("over", [1, 6])
def test_surrogate_equals_its_formula(over):
    routed = tiny(24, mean_over=over)
    nn.init.normal_(routed.router.bias, generator=generator(3))
    given, sigma = batch(3, 4), 0.4
    Surrogate(Objective(), sigma)(routed, given, generator(5)).loss.backward()
    scores = routed.router.bias.detach() + sigma * torch.randn(2, 24, 4, generator=generator(5))
    gates, value = gated(routed, given, scores)
    value.mean().backward()
    expected = torch.zeros(24, 4)
    for row, k in enumerate((1, 2)):  # routable layers that run
        slopes = torch.zeros(24, 4)
        for token in range(1, 24):  # the first is a sink
            rivals = scores[row, token : token + 1] if over == 1 else scores[row, 1:]
            ordered, last = rivals.flatten().sort(descending=True).values, k * len(rivals)
            soft = ((scores[row, token] - (ordered[last - 1] + ordered[last]) / 2) / sigma).sigmoid()
            slopes[token] = soft * (1 - soft) / sigma
        pull = slopes * gates.grad[row, :, 1:-1]  # the sum of the sigmoids stays: of a token, or of the window
        alone = pull.sum(-1, keepdim=True) / slopes.sum(-1, keepdim=True).clamp(min=1e-9)
        expected += pull - slopes * (alone if over == 1 else pull.sum() / slopes.sum())
    torch.testing.assert_close(routed.router.bias.grad, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("estimator", [make() for make in ESTIMATORS.values()], ids=ESTIMATORS)
@pytest.mark.parametrize(
    ("options", "deciders"),
    [
        ({"prompt_plan": "shared", "reroute_every": None}, [4]),
        ({"reroute_every": None}, [0, 1, 2, 3, 4]),
        ({"prompt_plan": "shared", "reroute_every": 8}, [4, 12, 20]),
        ({"prompt_plan": "shared"}, [*range(4, 24)]),
    ],
)
def test_credit_goes_to_the_token_that_decided(estimator, options, deciders):
    routed = tiny(24, **options)
    estimator(routed, batch(3, 3, 4, 4), generator()).loss.backward()
    touched = routed.router.bias.grad.abs().sum(-1).nonzero()[:, 0].tolist()
    assert set(touched) <= set(deciders)
    assert deciders[-2 if deciders[-1] == 23 else -1] in touched


def test_the_estimator_of_gates_is_refused_for_scores():
    with pytest.raises(RegistryError, match="weighted"):
        estimator_for(tiny().router, "weighted", Objective(), {})


def test_an_estimator_that_cannot_be_made_is_named():
    with pytest.raises(RegistryError, match="NoObjective"):
        estimator_for(tiny().router, f"{__name__}:NoObjective", Objective(), {})


class NoObjective:
    """An estimator whose constructor takes nothing."""

    def __call__(self, routed, batch, generator):
        raise NotImplementedError


@pytest.mark.parametrize("plans", [0, 1, 3])
def test_perturbed_plans_come_in_pairs(plans):
    with pytest.raises(ValueError, match="plans"):
        Perturbed(Objective(), plans=plans)


def test_straight_through_equals_its_formula():
    routed, given = tiny(24), batch(3, 4)
    nn.init.normal_(routed.router.bias, generator=generator(3))
    estimate = StraightThrough(Objective())(routed, given, generator())
    estimate.loss.backward()
    scores = routed.router.bias.detach().expand(2, -1, -1)
    gates, value = gated(routed, given, scores)
    torch.testing.assert_close(estimate.objective, value.detach())
    value.mean().backward()
    pull, share = gates.grad[:, 1:, 1:-1], scores[:, 1:].softmax(-1)
    expected = (share.shape[-1] * share * (pull - (share * pull).sum(-1, keepdim=True))).sum(0)
    torch.testing.assert_close(routed.router.bias.grad[1:], expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_router_scores_for_the_budget_that_its_plan_has(name):
    routed, seen = tiny(), []
    score = routed.router.score
    routed.router.score = lambda context: seen.append(context.executed[:, 0].tolist()) or score(context)
    ESTIMATORS[name]()(routed, batch(3, 4), generator())
    assert [3, 4] in seen
