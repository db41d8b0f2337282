"""Layerwise routers in the engine: decided as states arrive, held to the exact count, equal in every form."""

import copy
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError
from buddy.plan import Plan, gate_order
from tests.engine import reference
from tests.engine.reference import FickleGates, arriving_states, clamped, decoded, whole_layers
from tests.tiny import FAMILIES, tiny_backbone

BATCH, LENGTH, PROMPT = 3, 14, 6
EXECUTED = torch.tensor([3, 4, 6])
IDS = torch.randint(3, 259, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
POLICIES = ["fill", "hole", "zero"]

routed_tiny = partial(reference.routed_tiny, router=FickleGates)


def padded() -> torch.Tensor:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    mask[2, :1] = 0
    return mask


def expected_plan(routed: RoutedLM, states, executed, follows=None, mask=None) -> torch.Tensor:
    """(B, T, L) bool in plain Python from the states that arrived; `follows` maps a token to whose gates hold."""
    geometry, sinks = routed.geometry, routed.sink_tokens
    batch, length, _ = states[0].shape
    runs = torch.ones(batch, length, geometry.layers, dtype=torch.bool)
    for row, t in product(range(batch), range(length)):
        asked = t if follows is None else follows[t]
        here = states[0][row].new_tensor(int(executed[row])).long()
        gates = [
            routed.router.gate(i, states[geometry.context_layer + i][row, asked], here) > 0
            for i in range(geometry.routable)
        ]
        position = t if mask is None else int(mask[row, : t + 1].sum()) - 1
        if position >= sinks and (mask is None or mask[row, t]):
            count = int(executed[row]) - geometry.always_on
            alone = routed.settings.mean_over > 1 and count < geometry.routable
            runs[row, t, geometry.context_layer : -1] = torch.tensor(gates if alone else clamped(gates, count))
    return runs


@pytest.mark.parametrize("policy", POLICIES)
def test_gates_alone_decide_where_a_budget_is_a_mean(policy):
    routed = routed_tiny(policy=policy)
    with routed.changed(mean_over=64):
        output = routed(IDS, executed=EXECUTED)
    stock = tiny_backbone().model
    logits, states = arriving_states(stock, IDS, output.runs, None, policy)
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-4)
    for row, t, index in product(range(BATCH), range(1, LENGTH), range(4)):
        is_open = routed.router.gate(index, states[1 + index][row, t], EXECUTED[row]) > 0
        assert bool(output.runs[row, t, 1 + index]) == bool(is_open or EXECUTED[row] == 6)
    assert len(output.executed[:, 1:].unique()) > 1
    assert torch.equal(output.executed, output.runs.sum(-1))


@pytest.mark.parametrize(("family", "policy"), [*((family, "fill") for family in FAMILIES), ("llama", "zero")])
def test_parallel_form_equals_brute_force(family, policy):
    routed = routed_tiny(family, policy=policy, sink_tokens=2)
    stock = tiny_backbone(family).model
    output = routed(IDS, executed=EXECUTED)
    assert len(output.runs[1].unique(dim=0)) > 3, "plans should change from token to token"
    logits, states = arriving_states(stock, IDS, output.runs, None, policy)
    torch.testing.assert_close(output.logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(output.runs, expected_plan(routed, states, EXECUTED))
    assert output.scores is None
    assert torch.equal(output.executed, output.runs.sum(-1))
    assert torch.equal(output.executed[:, 2:], EXECUTED[:, None].expand(-1, LENGTH - 2))


class Stuck(FickleGates):
    """All gates open, or none."""

    is_open = True

    def gate(self, index, hidden, executed):
        return torch.full(hidden.shape[:-1], 1.0 if self.is_open else -1.0)


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("form", ["window", "decode"])
def test_gates_are_held_to_the_count_both_ways(is_open, form):
    routed = routed_tiny(router=Stuck)
    routed.router.is_open = is_open
    runs = routed(IDS, executed=EXECUTED).runs if form == "window" else decoded(routed, IDS, EXECUTED, [PROMPT])[1]
    for row, k in enumerate(EXECUTED.tolist()):
        first = [True] * (k - 2) + [False] * (6 - k)  # stop when K have run; run where all are needed
        assert runs[row, 1:, 1:-1].unique(dim=0).tolist() == [first if is_open else first[::-1]]


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_the_order_of_gates_is_the_clamp_for_every_count(gates, data):
    order = gate_order(torch.tensor(gates))
    k = data.draw(st.integers(0, len(gates)))
    runs = Plan.from_scores(order, torch.tensor(k + 2), len(gates) + 2).runs[1:-1]
    assert runs.tolist() == clamped(gates, k)
    assert sum(clamped(gates, k)) == k
    assert (order >= len(gates)).tolist() == gates


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("scope", ["token", "prompt"])
def test_decode_agrees_with_the_parallel_form(policy, is_padded, scope):
    routed, mask = routed_tiny(policy=policy, scope=scope), padded() if is_padded else None
    parallel = routed(IDS, attention_mask=mask, executed=EXECUTED, prompt=PROMPT)
    real = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    for cuts in ([PROMPT], [PROMPT, PROMPT + 3]):
        logits, runs, record = decoded(routed, IDS, EXECUTED, cuts, mask)
        torch.testing.assert_close(logits[real], parallel.logits[real], atol=1e-4, rtol=1e-4)
        assert torch.equal(runs[real], parallel.runs[real])
        assert all(torch.equal(executed[:, -1], EXECUTED) for executed in record.executed[1:])
    stock = tiny_backbone("llama").model
    expected, states = arriving_states(stock, IDS, parallel.runs, mask, policy)
    torch.testing.assert_close(parallel.logits[real], expected[real], atol=1e-4, rtol=1e-4)
    follows = None if scope == "token" else [PROMPT - 1] * LENGTH
    assert torch.equal(parallel.runs[real], expected_plan(routed, states, EXECUTED, follows, mask)[real])


@pytest.mark.parametrize("mean_over", [1, 64])
@pytest.mark.parametrize("reroute_every", [2, 3, None])
@pytest.mark.parametrize("prompt_plan", ["token", "shared"])
def test_gates_hold_as_long_as_decisions_do(reroute_every, prompt_plan, mean_over):
    routed = routed_tiny(reroute_every=reroute_every, prompt_plan=prompt_plan, mean_over=mean_over)
    parallel = routed(IDS, executed=EXECUTED, prompt=PROMPT)
    last = PROMPT - 1
    follows = [
        t if t <= last else last + (t - last) // (reroute_every or LENGTH) * (reroute_every or 0) for t in range(LENGTH)
    ]
    if prompt_plan == "shared":
        follows[:PROMPT] = [last] * PROMPT
    _, states = arriving_states(tiny_backbone("llama").model, IDS, parallel.runs)
    assert torch.equal(parallel.runs, expected_plan(routed, states, EXECUTED, follows))
    for cuts in ([PROMPT], [PROMPT, PROMPT + 4]):
        logits, runs, _ = decoded(routed, IDS, EXECUTED, cuts)
        assert torch.equal(runs, parallel.runs)
        torch.testing.assert_close(logits, parallel.logits, atol=1e-4, rtol=1e-4)


def test_one_plan_an_input_asks_the_gates_of_the_prompt_alone():
    routed, asked = routed_tiny(scope="prompt"), []
    gate = routed.router.gate
    routed.router.gate = lambda index, hidden, executed: asked.append(hidden.shape[1]) or gate(index, hidden, executed)
    _, runs, _ = decoded(routed, IDS, EXECUTED, [PROMPT])
    assert asked == [1] * 4, "one token, the prompt's last, at each routable layer; nobody while decoding"
    assert all(len(row[1:].unique(dim=0)) == 1 for row in runs)
    assert len(runs[:, -1].unique(dim=0)) == 3


def test_another_budget_goes_on_with_the_gates_that_were_open():
    routed = routed_tiny(scope="prompt")
    model = routed.backbone.model
    with routed.at(executed=[4] * BATCH):
        cache = model(IDS[:, :PROMPT], use_cache=True).cache
    gates = (cache.scores[:, 0] >= 4).tolist()
    for k in (2, 3, 5):
        with routed.at(executed=[k] * BATCH) as record:
            model(IDS[:, PROMPT : PROMPT + 1], cache=copy.deepcopy(cache), use_cache=True)
        assert record.runs[0][:, 0, 1:-1].tolist() == [clamped(row, k - 2) for row in gates]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_later_tokens_change_nothing_before_them(family, everything):
    routed = routed_tiny(family)
    with whole_layers() if everything else nullcontext():
        whole = routed(IDS, executed=EXECUTED)
        for cut in range(1, LENGTH):
            changed = IDS.clone()
            changed[:, cut:] = (changed[:, cut:] + cut) % 250 + 3
            after = routed(changed, executed=EXECUTED)
            assert torch.equal(whole.runs[:, :cut], after.runs[:, :cut])
            if everything:  # no shape depends on the plan
                assert torch.equal(whole.logits[:, :cut], after.logits[:, :cut])
            torch.testing.assert_close(whole.logits[:, :cut], after.logits[:, :cut], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scope", ["token", "prompt"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_gives_each_row_its_budget(scope, beams):
    routed = routed_tiny(scope=scope)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": beams}
    with routed.at("3layers", "4layers", 1.0) as record:
        sequences = routed.backbone.model.generate(IDS[:, :PROMPT], **options)
    assert all(e[:, -1].tolist() == [3] * beams + [4] * beams + [6] * beams for e in record.executed[1:])
    if beams == 1:
        logits = routed(sequences, executed=EXECUTED, prompt=PROMPT).logits
        assert torch.equal(logits[:, PROMPT - 1 : -1].argmax(-1), sequences[:, PROMPT:])


def test_a_shared_batch_plan_is_the_mean_gate():
    routed = routed_tiny(batch_plan="shared")
    _, runs, _ = decoded(routed, IDS, torch.tensor([4, 4, 4]), [PROMPT])
    assert torch.equal(runs, runs[:1].expand_as(runs))
    output = routed(IDS, executed=torch.tensor([4, 4, 4]))
    assert torch.equal(output.runs, runs)
    _, states = arriving_states(tiny_backbone("llama").model, IDS, runs)
    gates = [routed.router.gate(i, states[1 + i], EXECUTED).sigmoid().mean(0) > 0.5 for i in range(4)]
    for t in range(1, LENGTH):
        assert runs[0, t, 1:-1].tolist() == clamped([bool(gate[t]) for gate in gates], 2)


@pytest.mark.parametrize("scope", ["token", "prompt"])
def test_weights_multiply_what_layers_add(scope):
    routed = routed_tiny(scope=scope, sink_tokens=1)
    stock, weights = tiny_backbone("llama").model, {}

    def weigh(index):
        def hook(_, args, output):
            gate = routed.router.gate(index - 1, args[0], EXECUTED).sigmoid()
            gate = gate[:, PROMPT - 1 : PROMPT].expand_as(gate).clone() if scope == "prompt" else gate
            weights[index - 1] = gate.clone()
            gate[:, 0] = 1.0
            return args[0] + gate[..., None] * (output - args[0])

        return hook

    for index in range(1, 5):
        stock.model.layers[index].register_forward_hook(weigh(index))
    output = routed(IDS, executed=EXECUTED, prompt=PROMPT, gate_weighted=True)
    torch.testing.assert_close(output.logits, stock(IDS).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.weights, torch.stack([weights[i] for i in range(4)], -1))
    assert (output.executed == 6).all(), "every layer was computed"


def test_gates_without_doubt_weigh_as_the_hard_plan():
    routed = routed_tiny()
    routed.router.gate = lambda index, hidden, _: hidden.new_full(hidden.shape[:-1], 1e3 if index in (0, 2) else -1e3)
    executed = torch.tensor([4, 4, 4])
    soft, hard = (routed(IDS, executed=executed, gate_weighted=weighted) for weighted in (True, False))
    torch.testing.assert_close(soft.logits, hard.logits, atol=1e-4, rtol=1e-4)
    assert hard.runs[0, 1].tolist() == [True, True, False, True, False, True]


@pytest.mark.parametrize("weighted", [False, True])
def test_gates_of_another_shape_are_refused(weighted):
    routed = routed_tiny()
    routed.router.gate = lambda index, hidden, _: hidden[..., :1]
    with pytest.raises(BuddyError, match=rf"\({BATCH}, {LENGTH}, 1\)"):
        routed(IDS, executed=EXECUTED, gate_weighted=weighted)


def test_weights_need_gates():
    ordinary = reference.routed_tiny()
    with pytest.raises(BuddyError, match="Fickle has no gates to weigh layers by"):
        ordinary(IDS, executed=EXECUTED, gate_weighted=True)
