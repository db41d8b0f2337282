"""Training of layerwise routers: by the weights of their gates, from the estimator to the run folder."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from buddy.builders.data import build_held_out
from buddy.builders.model import load_model
from buddy.compare import fit
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import BuddyError, TrainingError
from buddy.evaluation.evaluate import evaluate_run
from buddy.io import load_tensors
from buddy.losses import Objective
from buddy.run import read_run
from buddy.training.estimators import Perturbed, StraightThrough, TrainingBatch, Weighted
from routers.first import FiRST
from tests.engine.reference import Fickle, clamped
from tests.small import only_seeds
from tests.tiny import tiny_backbone

pytestmark = pytest.mark.slow

IDS = torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(0))
PROMPT = 5


def tiny(policy: str = "fill", **options) -> RoutedLM:
    backbone = tiny_backbone("llama")
    return RoutedLM(backbone, FiRST(geometry_of(backbone), **options), policy=policy)


def batch(*executed: int) -> TrainingBatch:
    return TrainingBatch(IDS[: len(executed)], torch.tensor(executed), torch.arange(PROMPT - 1, 23), prompt=PROMPT)


def estimate(routed: RoutedLM, *executed: int, **objective: float):
    return Weighted(Objective(**objective))(routed, batch(*executed), torch.Generator())


@pytest.mark.parametrize(
    ("scope", "gates", "policy"), [("prompt", "hard", "fill"), ("token", "soft", "fill"), ("token", "hard", "zero")]
)
def test_gradients_reach_the_gates_alone(scope, gates, policy):
    routed = tiny(policy, scope=scope, gates=gates)
    result = estimate(routed, 3, 4, 6, 5)
    result.loss.backward()
    for name, parameter in routed.router.named_parameters():
        assert (parameter.grad.flatten(1) if name == "weight" else parameter.grad[:, None]).abs().sum(1).all(), name
    assert all(parameter.grad is None for parameter in routed.backbone.model.parameters())
    assert result.objective.shape == (4,)
    assert result.objective[2] == 0
    assert result.context is None


def test_the_loss_is_the_objective_and_the_penalty():
    routed = tiny(gates="soft", penalty_weight=7.0, budget_aware=False, start=0.4)
    given, executed = batch(3, 4), torch.tensor([3, 4])
    result = estimate(routed, 3, 4, kl=0.0, ce=1.0)
    output = routed(given.input_ids, executed=executed, prompt=PROMPT, logits_to_keep=given.scored, gate_weighted=True)
    targets = given.input_ids[:, given.scored + 1]
    expected = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, -1).mean(1)
    torch.testing.assert_close(result.objective, expected.detach())
    probability = 1 / (1 + torch.tensor(-0.4).exp())
    penalty = 7 * (probability - torch.tensor([0.0, 0.25])).clamp(min=0)
    torch.testing.assert_close(result.loss, (expected + penalty).mean())


@pytest.mark.parametrize("over", [1, 8])
def test_the_plans_are_those_of_the_open_gates(over):
    routed = tiny(scope="token")
    routed.settings = replace(routed.settings, mean_over=over)
    with torch.no_grad():
        routed.router.weight.normal_(generator=torch.Generator().manual_seed(0))
        routed.router.bias.zero_()
    result = estimate(routed, 3, 6, 4)
    assert result.runs[1].all()
    executed = torch.tensor([3, 6, 4])
    weights = routed(IDS[:3], executed=executed, prompt=PROMPT, gate_weighted=True).weights
    for row in (0, 2):
        for t in range(24):
            count = int(executed[row]) - 2
            is_open = (weights[row, t] > 0.5).tolist()
            assert result.runs[row, t, 1:-1].tolist() == (clamped(is_open, count) if over == 1 else is_open)
            assert result.runs[row, t, [0, -1]].all()


@pytest.mark.parametrize(("router", "estimator"), [(FiRST, Perturbed), (FiRST, StraightThrough), (Fickle, Weighted)])
def test_an_estimator_for_the_other_kind_of_router_names_the_router(router, estimator):
    backbone = tiny_backbone("llama")
    with pytest.raises(BuddyError if estimator is Weighted else TrainingError, match=router.__name__):
        estimator(Objective())(RoutedLM(backbone, router(geometry_of(backbone))), batch(3, 4), torch.Generator())


def test_gradient_checkpointing_is_refused():
    routed = tiny()
    routed.backbone.model.activation_checkpointing_enable()
    routed.backbone.model.train()
    with pytest.raises(BuddyError, match="checkpointing"):
        estimate(routed, 3, 4)


@pytest.fixture(scope="module")
def layerwise(small, tmp_path_factory):
    """A run of `first`, with `pudding` beside it."""
    output = tmp_path_factory.mktemp("layerwise")
    fit(small(output, "router=first", "rivals=[pudding]", "optimizer.lr=0.02"), "small")
    return only_seeds(output / "small")


def test_fit_trains_gates_whatever_the_recipes_estimator(layerwise):
    learned = load_tensors(layerwise / "first" / "router.safetensors")
    assert learned["weight"].abs().sum() > 0
    assert (layerwise / "first" / "checkpoints" / "last.ckpt").exists()
    assert not (layerwise / "pudding" / "checkpoints").exists()
    for name in ("first", "pudding"):
        for result in json.loads((layerwise / name / "metrics.json").read_text())["results"]:
            assert set(result["executed"].values()) == {result["layers"]}


def test_gates_alone_decide_how_many_layers_run_where_that_is_asked(layerwise, tmp_path):
    evaluate_run(layerwise / "first", json_file=tmp_path / "own.json", mean_over=64)
    full, *below = json.loads((tmp_path / "own.json").read_text())["results"]
    assert full["executed"]["mean"] == 6
    run = read_run(layerwise / "first")
    routed = load_model(run)
    ids = build_held_out(run.recipe, routed.backbone).test.input_ids
    for result in below:
        executed = torch.full((len(ids),), result["layers"])
        weights = routed(ids, executed=executed, prompt=12, gate_weighted=True).weights
        assert result["executed"]["mean"] == pytest.approx(2 + weights[:, 1:].sum(-1).mean().item(), abs=1e-3)
        assert result["executed"]["scored"] == pytest.approx(2 + weights[:, 11:-1].sum(-1).mean().item(), abs=1e-3)
    routed.settings = replace(routed.settings, mean_over=64)
    assert routed.mean_over == 64, "gates of one plan per input, too"
    evaluate_run(layerwise / "pudding", json_file=tmp_path / "prompt.json", mean_over=64)
    for result in json.loads((tmp_path / "prompt.json").read_text())["results"]:
        assert set(result["executed"].values()) == {result["layers"]}, "one plan per input"


@pytest.mark.parametrize("name", ["first", "pudding"])
def test_a_saved_run_generates_as_it_was_measured(layerwise, name):
    routed = load_model(read_run(layerwise / name))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with routed.at(0.75) as record:
        sequences = routed.backbone.model.generate(IDS[:2, :12], **options)
    assert [executed[:, -1].tolist() for executed in record.executed] == [[4, 4]] * 6
    runs = torch.cat(record.runs, 1)
    assert torch.equal(runs[:, 1:], runs[:, 1:2].expand(-1, runs.shape[1] - 1, -1)), "one plan per input"
    assert torch.equal(routed(sequences[:, :-1], executed=torch.tensor([4, 4]), prompt=12).runs, runs)
