"""Bridges in the engine: brute force, the parallel form against decode, causality, gradients, files."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from buddy.engine.bridges import Bridges
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import DamagedError
from tests.engine import reference
from tests.engine.reference import Fickle, FickleGates, random_bridges, reference_logits, routed_tiny, whole_layers
from tests.tiny import FAMILIES, tiny_backbone

IDS = torch.randint(3, 259, (3, 14), generator=torch.Generator().manual_seed(1))
EXECUTED = torch.tensor([3, 4, 6])


bridged = partial(routed_tiny, bridges=True)


@pytest.mark.parametrize(
    ("family", "policy"),
    [*((family, "fill") for family in FAMILIES), ("llama", "hole"), ("llama", "zero")],
)
def test_parallel_form_equals_brute_force(family, policy):
    routed, stock = bridged(family, policy=policy), tiny_backbone(family).model
    output = routed(IDS, executed=EXECUTED)
    expected = reference_logits(stock, IDS, output.runs, policy=policy, bridges=routed.bridges)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    without = reference_logits(stock, IDS, output.runs, policy=policy)
    assert (expected - without).abs().max() > 0.01, "these bridges should show"


@pytest.mark.parametrize("router", [Fickle, FickleGates])
@pytest.mark.parametrize("policy", ["fill", "hole", "zero"])
def test_decode_equals_parallel_form(router, policy):
    routed = bridged(router=router, policy=policy)
    parallel = routed(IDS, executed=EXECUTED).logits
    logits, _, _ = reference.decoded(routed, IDS, EXECUTED, [5])
    torch.testing.assert_close(logits, parallel, atol=1e-4, rtol=1e-4)


def test_full_depth_and_dense_are_the_stock_model():
    routed, stock = bridged(), tiny_backbone().model
    assert torch.equal(routed(IDS, executed=torch.tensor([6, 6, 6])).logits, stock(IDS).logits)
    assert torch.equal(routed.dense(IDS), stock(IDS).logits)


def test_later_tokens_change_nothing_before():
    routed, other = bridged(), IDS.clone()
    other[:, 9:] = 5
    with whole_layers():
        first, second = (routed(ids, executed=EXECUTED) for ids in (IDS, other))
    assert torch.equal(first.logits[:, :9], second.logits[:, :9])
    assert torch.equal(first.runs[:, :9], second.runs[:, :9])


def test_taken_off_they_leave_no_trace():
    routed = bridged()
    with_bridges = routed(IDS, executed=EXECUTED).logits
    routed.bridge(None)
    without = routed(IDS, executed=EXECUTED).logits
    plain = RoutedLM(tiny_backbone(), Fickle(routed.geometry))
    assert torch.equal(without, plain(IDS, executed=EXECUTED).logits)
    assert not torch.equal(without, with_bridges)


@pytest.mark.parametrize("everywhere", [False, True])
def test_gradients_reach_them_and_equal_a_difference_quotient(everywhere):
    routed = bridged()
    runs = routed(IDS, executed=EXECUTED).runs
    bridges = routed.bridges.trainable()

    def loss() -> torch.Tensor:
        with whole_layers() if everywhere else nullcontext():
            return routed(IDS, runs=runs).logits.square().mean()

    loss().backward()
    layer, step = int(bridges.fitted.nonzero()[0]), 1e-2
    assert (~runs[..., layer]).any()
    slope = bridges.bias.grad[layer, 7].item()
    with torch.no_grad():
        values = []
        for change in (step, -2 * step):
            bridges.bias[layer, 7] += change
            values.append(loss().item())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05)
    assert all(part.grad.abs().sum() > 0 for part in (bridges.down, bridges.up))


def test_gates_have_the_value_of_the_plan_and_the_gradient_of_a_mixture():
    routed, stock = bridged(), tiny_backbone().model
    runs = routed(IDS, executed=EXECUTED).runs
    gates, shares = (runs.float().requires_grad_() for _ in range(2))

    def mix(index):
        def hook(_, args, output):
            skipped = reference.bridged(routed.bridges, index, args[0])
            return skipped + shares[..., index, None] * (output - skipped)

        return hook

    for index in range(1, 6):
        stock.model.layers[index].register_forward_hook(mix(index))
    with whole_layers():
        hard = routed(IDS, runs=runs).logits
    soft = routed(IDS, runs=runs, gates=gates).logits
    torch.testing.assert_close(soft, hard)
    for logits in (soft, stock(IDS).logits):
        logits.square().mean().backward()
    torch.testing.assert_close(gates.grad[:, 1:, 1:5], shares.grad[:, 1:, 1:5], atol=1e-5, rtol=1e-3)


def test_file(tmp_path):
    routed, path = bridged(), tmp_path / "bridge.safetensors"
    saved = routed.bridges
    saved.save(path)
    loaded = Bridges.load(path, routed.geometry, 4)
    assert all(torch.equal(part, saved.state_dict()[name]) for name, part in loaded.state_dict().items())
    expected = routed(IDS, executed=EXECUTED).logits
    routed.bridge(loaded)
    assert torch.equal(routed(IDS, executed=EXECUTED).logits, expected)
    for rank in (5, 10**12):
        with pytest.raises(DamagedError, match=f"rank {rank}"):
            Bridges.load(path, routed.geometry, rank)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedError):
        Bridges.load(path, routed.geometry, 4)
    with pytest.raises(DamagedError):
        Bridges.load(tmp_path / "none", routed.geometry, 4)


def test_a_copy_keeps_them():
    routed = bridged()
    assert torch.equal(copy.deepcopy(routed.bridges)(2, torch.ones(1, 1, 64)), routed.bridges(2, torch.ones(1, 1, 64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_ones_take_over_what_is_loaded(dtype):
    geometry = geometry_of(tiny_backbone())
    first, second = (random_bridges(geometry, seed).freeze(dtype) for seed in (0, 1))
    first.load_state_dict(second.state_dict())
    hidden = torch.randn(2, 5, geometry.hidden, generator=torch.Generator().manual_seed(0)).to(dtype)
    for states in (hidden, hidden[:, :1]):  # a prompt, and a decoded token
        assert torch.equal(first(2, states), second(2, states))


def test_frozen_ones_follow_a_backbone_that_is_cast():
    routed = bridged()
    before = routed(IDS, executed=EXECUTED).logits
    routed.backbone.model.bfloat16()
    with routed.at(executed=EXECUTED.tolist()), torch.inference_mode():
        after = routed.backbone.model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert after.shape[1] == IDS.shape[1] + 2
    routed.backbone.model.get_input_embeddings().requires_grad_(True)
    logits = routed(IDS, executed=EXECUTED).logits
    torch.testing.assert_close(logits.detach().float(), before, atol=0.3, rtol=0.1)
    logits.sum().backward()
    assert routed.backbone.model.get_input_embeddings().weight.grad.any()
