"""Budgets that hold in the mean over tokens: the scores of neighbouring tokens compete for layers."""

from functools import partial
from itertools import product

import pytest
import torch

from buddy.engine.batches import Batch as Rows
from buddy.engine.batches import join, keep
from buddy.errors import BuddyError, BudgetError, TrainingError
from buddy.losses import Objective
from buddy.training.estimators import Perturbed, TrainingBatch
from tests.engine import reference
from tests.engine.reference import Fickle, FickleGates, decoded, reference_logits
from tests.tiny import tiny_backbone

LENGTH, OVER = 20, 6
EXECUTED = torch.tensor([3, 4])

routed_tiny = partial(reference.routed_tiny, mean_over=OVER)


def ids_of(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(1))


def expected_plan(scores, executed, over, sinks):
    """(B, T, L) by definition: each layer is ranked among those of `over` tokens; ties by layer, then by token."""
    batch, length, routable = scores.shape
    runs = torch.ones(batch, length, routable + 2, dtype=torch.bool)
    for row in range(batch):
        k, excess = int(executed[row]) - 2, 0
        for t in range(sinks, length):
            rivals = range(max(sinks, t - over + 1), t + 1)
            ranked = sorted((-scores[row, u, i].item(), i, u) for u in rivals for i in range(routable))
            best = ranked[: max(0, k * len(rivals) - min(4, len(rivals)) * excess)]
            chosen = [(-scores[row, t, i].item(), i, t) in best for i in range(routable)]
            excess += sum(chosen) - k
            runs[row, t, 1:-1] = torch.tensor(chosen)
    return runs


@pytest.mark.parametrize("sinks", [0, 1, 2])
@pytest.mark.parametrize("over", [2, OVER, 64, 10**30])
@pytest.mark.parametrize("chunk", [7, 512])
def test_the_parallel_form_is_the_definition(over, sinks, chunk, monkeypatch):
    monkeypatch.setattr("buddy.plan.CHUNK", chunk)  # tokens whose scores are ranked at once
    routed, ids = routed_tiny(mean_over=over, sink_tokens=sinks), ids_of()
    output = routed(ids, executed=EXECUTED)
    assert torch.equal(output.runs, expected_plan(output.scores, EXECUTED, over, sinks))
    assert len(output.executed[:, sinks:].unique()) > 2, "tokens should run different numbers of layers"
    logits = reference_logits(tiny_backbone().model, ids, output.runs)
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cuts", [[1], [5], [2, 9, 11]])
@pytest.mark.parametrize("policy", ["fill", "hole", "zero"])
def test_decoding_is_the_parallel_form(cuts, policy):
    routed, ids = routed_tiny(policy=policy), ids_of()
    output = routed(ids, executed=EXECUTED)
    logits, runs, _ = decoded(routed, ids, EXECUTED, cuts)
    assert torch.equal(runs, output.runs)
    torch.testing.assert_close(logits, output.logits, atol=1e-4, rtol=1e-4)


def test_padding_takes_no_part():
    routed, ids = routed_tiny(), ids_of()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    logits, runs, _ = decoded(routed, ids, EXECUTED, [8], mask)
    alone = routed(ids[1:, 3:], executed=EXECUTED[1:])
    assert torch.equal(runs[1, 3:], alone.runs[0])
    torch.testing.assert_close(logits[1, 3:], alone.logits[0], atol=1e-4, rtol=1e-4)


def test_plans_depend_on_nothing_after_their_token():
    routed, ids = routed_tiny(), ids_of()
    changed = ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 7) % 250 + 3
    before, after = (routed(each, executed=EXECUTED).runs for each in (ids, changed))
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12:], after[:, 12:])


class Constant(Fickle):
    """The same scores for each token, with ties."""

    def score(self, context):
        return torch.tensor([1.0, 2.0, 1.0, 2.0]).expand(*context.hidden.shape[:-1], 4)


def test_equal_scores_run_exactly_k():
    routed, exact = (routed_tiny(router=Constant, mean_over=over) for over in (OVER, 1))
    ids = ids_of()
    assert torch.equal(routed(ids, executed=EXECUTED).runs, exact(ids, executed=EXECUTED).runs)


class Rising(Fickle):
    """Scores that rise from token to token, each above all earlier ones: a competition that they always win."""

    def score(self, context):
        tokens = torch.arange(context.hidden.shape[-2], dtype=torch.float32)[:, None]
        return super().score(context) + 100 * tokens


@pytest.mark.parametrize("router", [Fickle, Rising])
def test_the_mean_of_each_text_is_near_k_whatever_the_scores_do(router):
    routed, ids = routed_tiny(router=router, mean_over=32), ids_of(8, 200)
    executed = routed(ids, executed=torch.full((8,), 4)).executed[:, 1:].float()
    assert (executed.mean(1) - 4).abs().max() < 0.15


@torch.no_grad()
def test_rows_that_join_and_leave_keep_their_own_past():
    routed, ids, batches = routed_tiny(), ids_of(2, 12), []
    model = routed.backbone.model
    for row, length in enumerate((9, 4)):
        with routed.at(executed=[int(EXECUTED[row])]):
            cache = model(ids[row : row + 1, :length], use_cache=True).cache
        batches.append(Rows(cache, torch.ones(1, length, dtype=torch.bool), [row]))
    batch = join(routed, batches)
    for step in range(3):
        following = torch.stack([ids[0, 9 + step], ids[1, 4 + step]])[:, None]
        with routed.at(executed=EXECUTED.tolist()) as record:
            inputs = {"position_ids": batch.positions, "attention_mask": batch.extend()}
            model(following, cache=batch.cache, use_cache=True, **inputs)
        for row, length in enumerate((9, 4)):
            alone = routed(ids[row : row + 1, : length + step + 1], executed=EXECUTED[row : row + 1]).runs[0, -1]
            assert torch.equal(record.runs[-1][row, 0], alone)
    batch = keep(routed, batch, [1])
    with routed.at(executed=[4]) as record:
        inputs = {"position_ids": batch.positions, "attention_mask": batch.extend()}
        model(ids[1:, 7:8], cache=batch.cache, use_cache=True, **inputs)
    assert torch.equal(record.runs[-1][0, 0], routed(ids[1:, :8], executed=EXECUTED[1:]).runs[0, -1])


@torch.no_grad()
@pytest.mark.parametrize("row", range(6))
def test_full_depth_takes_no_part_whoever_is_beside_it(row):
    routed, ids = routed_tiny(sink_tokens=0), ids_of(7)
    model, steps = routed.backbone.model, [3, 6, 6, 3, 6, 4, 4, 3, 6]

    def runs_of(rows):
        with routed.at(executed=[3] * len(rows)) as prompt:
            cache = model(ids[rows, :8], use_cache=True).cache
        found = prompt.runs
        for at, executed in enumerate(steps, start=8):
            with routed.at(executed=[executed, 4][: len(rows)]) as record:
                model(ids[rows, at : at + 1], cache=cache, use_cache=True)
            found += record.runs
        return torch.cat(found, 1)[0]

    alone, beside = runs_of([row]), runs_of([row, 6])
    assert torch.equal(alone, beside)
    assert all(count == 6 for count, asked in zip(beside[8:].sum(-1).tolist(), steps, strict=True) if asked == 6)


@pytest.mark.parametrize("options", [{"prompt_plan": "shared"}, {"batch_plan": "shared"}, {"reroute_every": 2}])
def test_plans_that_several_tokens_or_rows_share_run_exactly_k(options):
    executed = routed_tiny(**options)(ids_of(), executed=EXECUTED, prompt=8).executed
    assert torch.equal(executed[:, 1:], EXECUTED[:, None].expand(-1, LENGTH - 1))


def test_equal_scores_give_each_token_as_many_layers_in_training_too():
    routed = routed_tiny()
    scores = torch.zeros(2, LENGTH, routed.geometry.routable)
    counts = routed.plan(scores, EXECUTED).sum(-1)
    assert torch.equal(counts[:, 1:], EXECUTED[:, None].expand(-1, LENGTH - 1))


def test_values_out_of_range_are_refused():
    with pytest.raises(BuddyError, match="mean_over"):
        routed_tiny(mean_over=0)
    for router, wrong in product([Fickle, FickleGates], [[1, 4], [4, 7], [6, 7]]):
        with pytest.raises(BudgetError):
            routed_tiny(router=router)(ids_of(), executed=torch.tensor(wrong))


def test_a_router_of_one_plan_an_input_runs_exactly_k():
    routed = routed_tiny()
    routed.router.scope = "prompt"
    with routed.changed():
        executed = routed(ids_of(), executed=EXECUTED, prompt=8).executed
    assert torch.equal(executed[:, 1:], EXECUTED[:, None].expand(-1, LENGTH - 1))


def test_perturbed_plans_are_refused():
    batch = TrainingBatch(ids_of(), EXECUTED, torch.arange(4, LENGTH - 1), prompt=5)
    with pytest.raises(TrainingError, match="surrogate"):
        Perturbed(Objective())(routed_tiny(), batch, torch.Generator())
