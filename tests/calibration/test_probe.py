"""What a router may measure, against brute force on a fresh stock model."""

import math
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from buddy import Router
from buddy.calibration import measures
from buddy.calibration.bridges import fit_bridges
from buddy.engine.model import RoutedLM
from buddy.errors import BackboneError
from buddy.losses import DenseDistribution, cross_entropy, kl_to_dense
from routers.greedy import BridgedRemoval
from tests.calibration.small import LAYERS, WINDOWS, count_calls, plans, probe, routed
from tests.engine.reference import reference_logits
from tests.tiny import tiny_model

SINKS = 1
SHARED = routed()
MANY = torch.cat([WINDOWS, WINDOWS.flip(0, 1), WINDOWS.roll(3, 1)])  # enough tokens for bridges on a part of them


@cache
def alone(criterion: str) -> tuple[Tensor, Tensor]:
    """All 16 plans (16, L), and the losses (16, N) that a probe of its own measures for each."""
    runs = torch.ones(16, LAYERS, dtype=torch.bool)
    runs[:, 1:5] = torch.tensor([[bool(plan >> bit & 1) for bit in range(4)] for plan in range(16)])
    return runs, torch.cat([probe(SHARED).losses(plan[None], criterion) for plan in runs])


def loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())


@pytest.mark.parametrize("context_layer", [1, 2])
def test_block_influence(context_layer):
    model, seen = tiny_model("llama"), {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, args, out, index=index: seen.update({index: (args[0], out)}))
    model(WINDOWS)
    routable = range(context_layer, 5)
    expected = [
        1 - F.cosine_similarity(before[:, SINKS:], after[:, SINKS:], dim=-1).mean()
        for before, after in (seen[index] for index in routable)
    ]
    torch.testing.assert_close(
        probe(routed(context_layer=context_layer)).block_influence, torch.stack(expected), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("context_layer", [1, 2])
def test_loss_increase(context_layer):
    model, rises = tiny_model("llama"), []
    for skipped in range(context_layer, 5):
        runs = torch.ones(*WINDOWS.shape, 6, dtype=torch.bool)
        runs[:, SINKS:, skipped] = False
        rises.append(loss(reference_logits(model, WINDOWS, runs)).exp() - loss(model(WINDOWS).logits).exp())
    torch.testing.assert_close(
        probe(routed(context_layer=context_layer)).loss_increase, torch.stack(rises), atol=1e-2, rtol=1e-3
    )


@pytest.mark.parametrize("batch_size", [2, 5])
def test_taylor(batch_size):
    model = tiny_model("llama").requires_grad_(True)
    loss(model(WINDOWS).logits).backward()
    expected = [
        sum((p * p.grad).abs().sum() for name, p in model.model.layers[index].named_parameters() if "norm" not in name)
        for index in range(1, 5)
    ]
    torch.testing.assert_close(probe(batch_size=batch_size).taylor, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_taylor_leaves_the_model_frozen_even_when_it_is_stopped():
    def stop_after_one(batches, _):
        yield batches[0]
        raise KeyboardInterrupt

    for track in (None, stop_after_one):
        measured = probe(track=track)
        with pytest.raises(KeyboardInterrupt) if track else nullcontext():
            assert (measured.taylor > 0).all()
        assert not any(p.requires_grad or p.grad is not None for p in measured.routed.backbone.model.parameters())


@pytest.mark.parametrize("measure", ["block_influence", "loss_increase", "taylor"])
def test_nothing_is_measured_twice(measure):
    shown = []
    measured = probe(track=lambda items, words: shown.append(words) or items)
    first, second = getattr(measured, measure), getattr(measured, measure)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()  # the caller may change the result
    assert len(shown) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "context_layer", "sinks"),
    [("llama", 1, 1), ("llama", 3, 0), ("gemma2", 3, 2), ("mistral-sliding", 1, 0)],
)
def test_losses_are_those_of_a_routed_forward(family, context_layer, sinks):
    model = routed(family, context_layer, sinks)
    runs = plans(6, context_layer=context_layer, seed=sinks)
    measured, dense = probe(model), DenseDistribution(model.dense(WINDOWS)[:, :-1])
    ce, kl = measured.losses(runs), measured.losses(runs, "kl")
    assert ce.dtype == kl.dtype == torch.float64
    for index, plan in enumerate(runs):
        with torch.no_grad():
            logits = model(WINDOWS, runs=plan.expand(*WINDOWS.shape, -1)).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="none")
        torch.testing.assert_close(ce[index], each.view(5, -1).double().mean(1), atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(kl[index], kl_to_dense(dense, logits).double().mean(1), atol=2e-6, rtol=1e-5)


def test_fewer_windows_are_the_first_ones_bit_for_bit():
    runs = plans(4)
    whole, grown = probe().losses(runs), probe()
    for count in (1, 4, 5):
        assert torch.equal(grown.losses(runs, windows=count), whole[:, :count])
    assert torch.equal(probe().losses(runs, windows=3), whole[:, :3])


@pytest.mark.parametrize("criterion", ["ce", "kl"])
def test_some_windows_have_the_losses_that_they_have_among_all(criterion):
    measured, runs = probe(SHARED), plans(4)
    whole = measured.losses(runs, criterion)
    for chosen in ([0], [1, 4], range(1, 4)):
        some = measured.losses(runs, criterion, chosen)
        torch.testing.assert_close(some, whole[:, list(chosen)], atol=1e-6, rtol=1e-6)


def test_only_the_chosen_windows_run():
    measured, seen = probe(), []
    layer = measured.routed.backbone.layers[0]
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]) if args[0].shape[1] > 1 else None)
    measured.losses(plans(3), windows=[0, 2, 4])
    assert sum(rows for rows, _ in seen) == 3


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(calls=st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=6), min_size=1, max_size=4))
def test_losses_do_not_depend_on_what_else_was_asked(calls):
    measured, (runs, expected) = probe(SHARED), alone("ce")
    for rows in calls:
        assert torch.equal(measured.losses(runs[rows]), expected[rows])


def test_a_layer_runs_once_for_all_plans_that_begin_alike():
    model = routed()
    measured, called = probe(model, WINDOWS[:2]), count_calls(model)
    runs = torch.stack([measured.plan_without([index]) for index in range(4)])
    measured.losses(runs)
    # Layers 0 to 3 once for all; behind each of the four removed layers 1, 2, 3 and 4 what is left of the model.
    assert len(called) == 4 + (4 + 3 + 2 + 1)
    called.clear()
    measured.losses(runs)
    assert called == []


def test_the_next_round_goes_on_from_the_last():
    model = routed()
    measured, called = probe(model, WINDOWS[:2]), count_calls(model)
    measured.losses(torch.stack([measured.plan_without([index]) for index in range(4)]))
    called.clear()
    measured.losses(torch.stack([measured.plan_without([3, index]) for index in range(3)]))
    assert called == [5, 5, 5]  # without the fourth routable layer only the last one is left to run
    called.clear()
    probe(model, WINDOWS[:2], measured=measured.measured).losses(measured.plan_without([0, 1, 2, 3])[None])
    assert called == [0, 5]


@pytest.mark.slow
@pytest.mark.parametrize(("room", "dense"), [(0, 0), (1, 10_000), (3, 0), (7, 2 << 30)])
def test_little_room_changes_nothing(room, dense, monkeypatch):
    kept = measures.prefixes_to_keep
    monkeypatch.setattr(measures, "prefixes_to_keep", lambda plans, layers, _: kept(plans, layers, room))
    monkeypatch.setattr(measures, "MAX_DENSE", dense)
    measured = probe(SHARED)
    for removed in ([], [3], [3, 1]):
        bits = [sum(1 << bit for bit in range(4) if bit not in (*removed, index)) for index in range(4)]
        for criterion in ("ce", "kl"):
            runs, expected = alone(criterion)
            assert torch.equal(measured.losses(runs[bits], criterion), expected[bits])


PLANS = st.lists(st.text("01", min_size=8, max_size=8), min_size=1, max_size=12)


@settings(max_examples=50)
@given(plans=PLANS, room=st.integers(0, 100))
def test_states_are_kept_at_as_many_layers_as_fit(plans, room):
    kept = measures.prefixes_to_keep(plans, 8, room)
    ends = {len(start) for start in kept}
    assert len(kept) <= room
    assert kept == {plan[:end] for plan in plans for end in ends}
    if len(ends) < 7:
        ends = {round(8 * number / (len(ends) + 2)) for number in range(1, len(ends) + 2)}
        assert len({plan[:end] for plan in plans for end in ends}) > room


def test_a_round_of_kl_runs_the_dense_model_once():
    model = routed()
    measured, called = probe(model, WINDOWS[:2]), count_calls(model)
    measured.losses(measured.plan_without([3])[None], "kl")
    assert len(called) == 6 + 1
    called.clear()
    measured.losses(measured.plan_without([2, 3])[None], "kl")
    assert called == [5]


def test_what_is_refused():
    measured = probe(routed(context_layer=3))
    runs = plans(2, context_layer=3)
    for layer in (2, 5):
        wrong = runs.clone()
        wrong[0, layer] = False
        with pytest.raises(ValueError, match="always runs"):
            measured.losses(wrong)
    for wrong in (runs[0], runs.float()):
        with pytest.raises(ValueError, match="runs"):
            measured.losses(wrong)
    with pytest.raises(ValueError, match="mse"):
        measured.losses(runs, "mse")
    for windows in (0, 6, [], [5], [-1], [2, 1], [1, 1]):
        with pytest.raises(ValueError, match="windows"):
            measured.losses(runs, windows=windows)


def test_no_plans_have_no_losses_and_the_dense_plan_has_no_kl():
    none = torch.ones(0, LAYERS, dtype=torch.bool)
    assert probe(SHARED).losses(none).shape == (0, 5)
    assert probe(SHARED).losses(none, windows=[0, 3]).shape == (0, 2)
    assert probe(SHARED).losses(torch.ones(1, LAYERS, dtype=torch.bool), "kl").abs().max() < 1e-6


def test_plan_without():
    measured = probe(routed(context_layer=2))
    assert measured.plan_without([0, 2]).tolist() == [True, True, False, True, False, True]
    assert measured.plan_without([]).all()


@pytest.mark.parametrize("context_layer", [1, 3])
def test_angular_distance(context_layer):
    states = tiny_model("llama")(WINDOWS, output_hidden_states=True).hidden_states
    routable = 5 - context_layer
    expected = torch.zeros(routable + 1, routable + 1)
    for i in range(routable + 1):
        for j in range(i + 1, routable + 1):
            pairs = zip(states[context_layer + i][:, -1], states[context_layer + j][:, -1], strict=True)
            angles = [math.acos(F.cosine_similarity(a.double(), b.double(), dim=0).item()) for a, b in pairs]
            expected[i, j] = sum(angles) / len(angles) / math.pi
    measured = probe(routed(context_layer=context_layer)).angular_distance
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured, expected, atol=1e-6, rtol=1e-5)


def test_contexts_are_those_of_the_prompts_last_tokens():
    model = routed()
    with torch.no_grad():
        seen = model(WINDOWS).context
    context = probe(model, prompt=7).contexts()
    for name in ("pooled", "newest", "hidden"):
        torch.testing.assert_close(getattr(context, name), getattr(seen, name)[:, 6], atol=1e-5, rtol=1e-5)
        assert getattr(context, name).dtype == torch.float32
    assert context.executed.tolist() == [LAYERS] * 5


def test_probes_share_what_they_measured():
    first, runs = routed(), plans(3)
    measured = probe(first, layer_counts=[3, 6, 5, 3], seed=4, prompt=8)
    assert (measured.layer_counts, measured.seed, measured.prompt, measured.count) == ((5, 3), 4, 8, 5)
    before = measured.losses(runs)
    first.detach()
    second = type(first)(first.backbone, first.router, sink_tokens=SINKS)
    other, called = probe(second, measured=measured.measured), count_calls(second)
    assert torch.equal(other.losses(runs), before)
    assert called == []
    assert torch.equal(other.losses(plans(3, seed=9)), probe(second).losses(plans(3, seed=9)))


def test_progress_says_what_is_measured_and_bars_do_not_nest():
    shown = []

    def track(items, words):
        shown.append((words, len(items)))
        return items

    measured = probe(track=track)
    measured.losses(plans(3))
    measured.losses(plans(3))
    measured.losses(plans(1, seed=5), what="round 1 of 2")
    assert shown == [("losses of 3 plans", 9), ("round 1 of 2", 3)]
    for _ in measured.track([1, 2], "rounds"):
        measured.losses(plans(4, seed=6))
    assert shown[2:] == [("rounds", 2)]
    measured.losses(plans(1, seed=7))
    assert shown[3:] == [("losses of 1 plan", 3)]


class Fixed(Router):
    """One plan for all tokens: layers go in an order that is set."""

    order: tuple[int, ...]

    def score(self, context):
        return torch.tensor(self.order).argsort().float().expand(*context.executed.shape, -1)


@pytest.mark.slow
@pytest.mark.parametrize(("criterion", "sinks"), [("ce", 1), ("kl", 0)])
def test_losses_with_bridges_are_those_of_the_model_with_bridges_for_each_plan(criterion, sinks):
    model, settings = routed(sinks=sinks), {"rank": 8, "ridge": 0.1}
    measured = probe(model, windows=MANY, bridge=settings)
    sets = [[], [3], [1], [1, 3], [1, 2], [0, 1, 2], [0, 2, 3]]
    runs = torch.stack([measured.plan_without(removed) for removed in sets])
    without = measured.losses(runs, criterion)
    losses = torch.cat([measured.losses(some, criterion, bridged=True) for some in runs.split(3)])
    assert torch.equal(measured.losses(runs, criterion), without)
    dense, router = model.dense(MANY), Fixed(model.geometry)
    fixed = RoutedLM(model.backbone, router, sink_tokens=sinks)
    for removed, loss, plain in zip(sets, losses, without, strict=True):
        router.order = (*removed, *(layer for layer in range(4) if layer not in removed))
        executed = torch.full((len(MANY),), LAYERS - len(removed))
        fixed.bridge(None)
        fixed.bridge(fit_bridges(fixed, MANY[-measured.bridge_windows :], [LAYERS - len(removed)], **settings))
        logits = fixed(MANY, executed=executed).logits
        tokens = (
            cross_entropy(logits[:, :-1], MANY[:, 1:])
            if criterion == "ce"
            else kl_to_dense(DenseDistribution(dense[:, :-1]), logits[:, :-1])
        )
        torch.testing.assert_close(loss, tokens.double().mean(1), atol=1e-5, rtol=1e-5)
        assert not removed or not torch.allclose(loss, plain)


def test_bridges_bring_the_model_nearer():
    measured = probe(windows=MANY, bridge={"rank": 64, "ridge": 0.01})
    runs = measured.plan_without([0, 1, 2])[None]
    assert measured.losses(runs, "kl", bridged=True).mean() < 0.8 * measured.losses(runs, "kl").mean()


def test_too_few_tokens_for_a_bridge_leave_the_state_as_it_is():
    measured, runs = probe(windows=WINDOWS[:3], bridge={"rank": 8, "ridge": 0.1}), plans(3)  # 57 tokens, of width 64
    torch.testing.assert_close(measured.losses(runs, bridged=True), measured.losses(runs))


def test_a_recipe_without_bridges_has_losses_without_bridges():
    measured, runs = probe(), plans(3)
    assert measured.bridge_windows == 0
    assert torch.equal(measured.losses(runs, bridged=True), measured.losses(runs))


@pytest.mark.parametrize(("count", "fitted"), [(1, 1), (2, 1), (6, 4), (31, 23), (96, 24)])
def test_a_search_measures_on_other_windows_than_bridges_are_fitted_on(count, fitted):
    measured = probe(windows=WINDOWS[:1].repeat(count, 1), bridge={"rank": 8, "ridge": 0.1})
    search = BridgedRemoval(measured, 8)
    assert measured.bridge_windows == fitted
    assert search.windows == max(1, min(8, count - fitted))


@pytest.mark.parametrize("criterion", ["ce", "kl"])
def test_losses_that_are_not_finite_stop_the_calibration(criterion):
    model = routed()
    model.backbone.model.lm_head.weight.data[5] = math.inf
    with pytest.raises(BackboneError):
        probe(model).losses(plans(2), criterion)


def test_losses_of_long_windows_in_parts():
    ids, model = torch.randint(3, 259, (2, 150), generator=torch.Generator().manual_seed(0)), routed()
    found = probe(model, ids).losses(torch.ones(1, LAYERS, dtype=torch.bool))[0]
    logits = model.dense(ids)[:, :-1].transpose(1, 2)
    expected = F.cross_entropy(logits, ids[:, 1:], reduction="none").double().mean(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
