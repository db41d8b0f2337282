"""What a router may measure, against brute force on a fresh stock model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from buddy.losses import Dense, kl_to_dense
from tests.calibration.small import LAYERS, WINDOWS, count_calls, plans, probe, routed
from tests.engine.reference import reference_logits
from tests.tiny import FAMILIES, tiny_model

SINKS = 1


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


def is_frozen(model: torch.nn.Module) -> bool:
    return not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_after_taylor_the_model_is_frozen_again():
    measured = probe()
    assert (measured.taylor > 0).all()
    assert is_frozen(measured.routed.backbone.model)


def test_a_stopped_taylor_leaves_the_model_frozen():
    def stop_after_one(batches, _):
        yield batches[0]
        raise KeyboardInterrupt

    measured = probe(track=stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        _ = measured.taylor
    assert is_frozen(measured.routed.backbone.model)


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ("block_influence", ["block influence and angular distance"]),
        ("loss_increase", ["perplexity without a layer"]),
        ("taylor", ["Taylor importance"]),
    ],
)
def test_nothing_is_measured_twice(measure, words):
    shown = []

    def track(items, said):
        shown.append(said)
        return items

    measured = probe(track=track)
    first, second = getattr(measured, measure), getattr(measured, measure)
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()  # whoever asks may change what is given
    assert shown == words


def test_the_loss_under_a_plan_is_over_all_windows():
    measured = probe(batch_size=3)  # batches of three and two
    whole = torch.ones(6, dtype=torch.bool)
    assert measured.loss(whole) == pytest.approx(loss(tiny_model("llama")(WINDOWS).logits).item(), rel=1e-5)


@pytest.mark.parametrize("sinks", [0, 1, 2])
@pytest.mark.parametrize("context_layer", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_a_routed_forward(family, context_layer, sinks):
    model = routed(family, context_layer, sinks)
    runs = plans(6, context_layer=context_layer, seed=sinks)
    measured, dense = probe(model), Dense(model.dense(WINDOWS)[:, :-1])
    ce, kl = measured.losses(runs), measured.losses(runs, "kl")
    assert ce.dtype == kl.dtype == torch.float64
    for index, plan in enumerate(runs):
        with torch.no_grad():
            logits = model(WINDOWS, runs=plan.expand(*WINDOWS.shape, -1)).logits[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="none")
        torch.testing.assert_close(ce[index], each.view(5, -1).double().mean(1), atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(kl[index], kl_to_dense(dense, logits).double().mean(1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_losses_are_those_of_a_stock_model_by_brute_force(family):
    measured = probe(routed(family, sinks=2))
    for plan in plans(4, seed=3):
        runs = plan.repeat(*WINDOWS.shape, 1)
        runs[:, :2] = True
        expected = loss(reference_logits(tiny_model(family), WINDOWS, runs)).item()
        assert measured.losses(plan[None]).mean().item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("policy", ["hole", "zero"])
def test_losses_are_the_same_under_every_cache_policy(policy):
    stock = routed(sinks=2)
    model = type(stock)(stock.backbone, stock.router, sink_tokens=2, policy=policy)
    (plan,) = plans(1, seed=4)
    with torch.no_grad():
        expected = loss(model(WINDOWS, runs=plan.expand(*WINDOWS.shape, -1)).logits).item()
    assert probe(model).loss(plan) == pytest.approx(expected, abs=2e-6)


def test_kl_of_the_dense_plan_is_nothing():
    assert probe().losses(torch.ones(1, LAYERS, dtype=torch.bool), "kl").abs().max() < 1e-6


def test_fewer_windows_are_the_first_ones_bit_for_bit():
    runs = plans(4)
    whole = probe().losses(runs)
    for count in (1, 2, 3, 5):
        assert torch.equal(probe().losses(runs, windows=count), whole[:, :count])
    grown = probe()
    for count in (1, 4, 5):
        assert torch.equal(grown.losses(runs, windows=count), whole[:, :count])


@settings(max_examples=15, deadline=None)
@given(calls=st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=6), min_size=1, max_size=4))
def test_losses_do_not_depend_on_what_else_was_asked(calls):
    runs = torch.ones(16, LAYERS, dtype=torch.bool)
    runs[:, 1:5] = torch.tensor([[bool(plan >> bit & 1) for bit in range(4)] for plan in range(16)])
    alone = _alone(runs)
    measured = probe(SHARED)
    for rows in calls:
        assert torch.equal(measured.losses(runs[rows]), alone[rows])


SHARED = routed()
KNOWN: list[Tensor] = []


def _alone(runs: Tensor) -> Tensor:
    """Each plan measured by a probe of its own, once for all examples."""
    if not KNOWN:
        KNOWN.append(torch.cat([probe(SHARED).losses(plan[None]) for plan in runs]))
    return KNOWN[0]


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
    measured.release()
    called.clear()
    measured.losses(measured.plan_without([0, 1, 2, 3])[None])
    assert called == [0, 5]


@pytest.mark.parametrize("room", [0, 1, 3, 7])
def test_little_room_for_states_changes_nothing(room, monkeypatch):
    monkeypatch.setattr("buddy.calibration.measures.room_for", lambda *_: room)
    measured = probe(SHARED)
    for removed in ([], [3], [3, 1]):
        runs = torch.stack([measured.plan_without([*removed, index]) for index in range(4) if index not in removed])
        for criterion in ("ce", "kl"):
            alone = torch.cat([probe(SHARED).losses(plan[None], criterion) for plan in runs])
            assert torch.equal(measured.losses(runs, criterion), alone)


def test_a_round_in_parts_goes_on_from_the_last_too():
    model = routed()
    measured, called = probe(model), count_calls(model)
    for removed in ([], [3]):
        called.clear()
        runs = torch.stack([measured.plan_without([*removed, index]) for index in range(3)])
        for windows in (2, 4, 5):
            measured.losses(runs, windows=windows)
    assert called == [5, 5, 5] * 3


def test_states_wait_for_as_many_batches_as_there_are():
    measured = probe(SHARED)  # batches of two, two and one
    for start in range(5):
        measured.losses(plans(2), windows=[start])
    assert list(measured._losses._kept) == [(2,), (3,), (4,)]
    measured.release()
    assert not measured._losses._kept


def test_a_round_of_kl_runs_the_dense_model_once():
    model = routed()
    measured, called = probe(model, WINDOWS[:2]), count_calls(model)
    measured.losses(measured.plan_without([3])[None], "kl")
    assert len(called) == 6 + 1
    called.clear()
    measured.losses(measured.plan_without([2, 3])[None], "kl")
    assert called == [5]


def test_what_plans_cannot_be():
    match = "keep the first 3 and the last"
    measured = probe(routed(context_layer=3))
    runs = plans(2, context_layer=3)
    wrong = runs.clone()
    wrong[0, 2] = False
    with pytest.raises(ValueError, match=match):
        measured.losses(wrong)
    wrong = runs.clone()
    wrong[1, 5] = False
    with pytest.raises(ValueError, match=match):
        measured.losses(wrong)
    with pytest.raises(ValueError, match=r"give plans \(P, 6\) of bool"):
        measured.losses(runs[0])
    with pytest.raises(ValueError, match=r"give plans \(P, 6\) of bool"):
        measured.losses(runs.float())
    with pytest.raises(ValueError, match="criterion is 'mse'; choose one of ce, kl"):
        measured.losses(runs, "mse")
    for count in (0, 6):
        with pytest.raises(ValueError, match=f"windows is {count}; there are 5 calibration windows"):
            measured.losses(runs, windows=count)


def test_no_plans_have_no_losses():
    assert probe().losses(torch.ones(0, LAYERS, dtype=torch.bool)).shape == (0, 5)


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


def test_what_is_asked_for():
    model = routed()
    measured = probe(model, asked=[3, 6, 5, 3], seed=4, prompt=8)
    assert (measured.asked, measured.seed, measured.prompt, measured.count) == ((5, 3), 4, 8, 5)
    measured.serve(model, [6])
    assert measured.asked == ()


def test_a_probe_serves_the_next_router():
    first = routed()
    measured, runs = probe(first), plans(3)
    before = measured.losses(runs)
    first.detach()
    second = type(first)(first.backbone, first.router, sink_tokens=SINKS)
    measured.serve(second, [4])
    called = count_calls(second)
    assert torch.equal(measured.losses(runs), before)
    assert called == []
    assert torch.equal(measured.losses(plans(3, seed=9)), probe(second).losses(plans(3, seed=9)))


@pytest.mark.parametrize("other", [{"sinks": 2}, {"context_layer": 2}, {}])
def test_a_probe_does_not_serve_another_model(other):
    measured = probe()
    with pytest.raises(ValueError, match="make another probe"):
        measured.serve(routed(**other), [])


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
