"""The adapter: what it adds, where it is left out, and how it is saved, read, merged and taken off."""

import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from buddy.backbone.adapter import CONFIG, FILES, WEIGHTS, Adapter, check_targets
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import BuddyError, RunError, TrainingError
from buddy.io import load_tensors, save_tensors
from tests.adapted import EXECUTED, IDS, adapted, by_hand, factors, new_adapter, stirred
from tests.engine.reference import Fickle, FickleGates, reference_logits
from tests.tiny import tiny_backbone, tiny_model

pytestmark = pytest.mark.slow

POLICIES = ["fill", "hole", "zero"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def is_stock(model) -> bool:
    plain = tiny_model("llama").state_dict()
    held = model.state_dict()
    same = held.keys() == plain.keys() and all(torch.equal(held[name], plain[name]) for name in plain)
    return same and not any(isinstance(module, BaseTunerLayer) for module in model.modules())


# What it adds


@pytest.mark.parametrize(
    ("family", "policy"),
    [*(("llama", policy) for policy in POLICIES), ("phi3", "fill"), ("gemma3", "hole"), ("qwen3", "fill")],
)
def test_routed_execution_equals_brute_force_on_weights_merged_by_hand(family, policy):
    routed = adapted(family, policy=policy)
    output = routed(IDS, executed=EXECUTED)
    expected = reference_logits(by_hand(routed.adapter, family), IDS, output.runs, policy=policy)
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    unhealed = reference_logits(tiny_model(family), IDS, output.runs, policy=policy)
    assert (output.logits - unhealed).abs().max() > 0.1


@pytest.mark.parametrize(("family", "policy"), [*(("llama", policy) for policy in POLICIES), ("phi3", "fill")])
def test_prefill_and_decode_write_the_adapters_keys_and_values_too(family, policy):
    """Skipped layers owe K/V (`fill`) that later tokens read: they come from the adapted projections."""
    routed = adapted(family, policy=policy)
    model, cut = routed.backbone.model, 8
    with routed.at(executed=EXECUTED.tolist()) as record:
        step = model(IDS[:, :cut], use_cache=True)
        logits = [step.logits]
        for t in range(cut, IDS.shape[1]):
            step = model(IDS[:, t : t + 1], cache=step.cache, use_cache=True)
            logits.append(step.logits)
    runs = torch.cat(record.runs, 1)
    assert (~runs[:2, cut:]).any((0, 1))[1:-1].all(), "every routable layer should be skipped by some new token"
    expected = reference_logits(by_hand(routed.adapter, family), IDS, runs, policy=policy)
    torch.testing.assert_close(torch.cat(logits, 1), expected, **CLOSE)


@pytest.mark.parametrize(("router", "context_layer"), [(Fickle, 1), (Fickle, 3), (FickleGates, 1)])
def test_a_new_adapter_changes_nothing_and_a_trained_one_only_what_comes_after_the_context(router, context_layer):
    backbone = tiny_backbone("llama")
    routed = RoutedLM(backbone, router(geometry_of(backbone, context_layer)))
    executed = torch.tensor([4, 5, 6])
    before = routed(IDS, executed=executed)
    routed.adapter = new_adapter(backbone, first=context_layer)
    assert torch.equal(routed(IDS, executed=executed).logits, before.logits)
    stirred(routed.adapter)
    after = routed(IDS, executed=executed)
    assert not torch.equal(after.logits, before.logits)
    if router is Fickle:
        assert torch.equal(before.runs, after.runs)
        for name in ("pooled", "newest", "hidden"):
            assert torch.equal(getattr(before.context, name), getattr(after.context, name))


def test_a_new_adapter_s_factors_depend_on_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, same, other = (factors(new_adapter(tiny_backbone("llama"), seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    adapter = new_adapter(tiny_backbone("llama"), rank=2, targets=["q_proj", "down_proj"])
    assert adapter.size == 5 * 2 * ((64 + 64) + (128 + 64))


# Where it is left out


def test_at_full_depth_it_is_part_of_the_model_and_the_reference_is_stock():
    routed, full = adapted(), torch.full((3,), 6)
    stock = tiny_model("llama")(IDS).logits
    torch.testing.assert_close(routed(IDS, executed=full).logits, by_hand(routed.adapter)(IDS).logits, **CLOSE)
    with routed.at(1.0):
        assert torch.equal(routed.backbone.model(IDS).logits, routed(IDS, executed=full).logits)
    assert torch.equal(routed.dense(IDS), stock)
    assert torch.equal(routed(IDS).logits, stock), "a forward without a plan"
    with routed.stock():
        assert torch.equal(routed.backbone.model(IDS).logits, stock)
        assert torch.equal(routed.dense(IDS), stock)
        assert torch.equal(routed.backbone.model(IDS).logits, stock), "off inside off"
    assert not torch.equal(routed(IDS, executed=full).logits, stock)


def test_products_are_in_the_backbones_type_while_it_is_trained_and_in_float32_otherwise():
    backbone = tiny_backbone("llama")
    backbone.model.bfloat16()
    adapter, seen = stirred(new_adapter(backbone)), []
    part = next(iter(adapter.parts.values()))
    part["B"].register_forward_hook(lambda module, given, result: seen.append((module.weight.dtype, result.dtype)))
    for change in (adapter.train, adapter.freeze):
        change()
        backbone.model(IDS)
    assert seen == [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)]


def test_switching_keeps_what_is_trainable_and_detaching_gives_the_stock_model_back():
    routed = adapted()
    routed.dense(IDS)
    assert all(parameter.requires_grad for parameter in routed.adapter.parameters())
    routed.adapter.freeze()
    routed.dense(IDS)
    assert not any(parameter.requires_grad for parameter in routed.backbone.model.parameters())
    assert not is_stock(routed.backbone.model)
    routed.detach()
    assert routed.adapter is None
    assert is_stock(routed.backbone.model)
    new_adapter(routed.backbone)  # another one can come: warnings are errors here


# Gradients


@pytest.mark.parametrize(("policy", "sinks"), [("fill", 0), ("fill", 1), ("hole", 1), ("zero", 0)])
def test_gradients_through_chosen_layers_equal_those_of_the_masked_whole(policy, sinks):
    routed = adapted(policy=policy, sink_tokens=sinks, size=0.05)
    weight = torch.randn(IDS.shape[0], IDS.shape[1], 259, generator=torch.Generator().manual_seed(2))

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        for parameter in routed.adapter.parameters():
            parameter.grad = None
        (logits.log_softmax(-1) * weight).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in routed.adapter.parameters()]

    output = routed(IDS, executed=EXECUTED)
    ours = gradients(output.logits)
    with routed._hooks.requested(None):
        whole = reference_logits.__wrapped__(routed.backbone.model, IDS, output.runs, None, policy)
    torch.testing.assert_close(output.logits, whole, **CLOSE)
    theirs = gradients(whole)
    assert sum(bool(gradient.any()) for gradient in theirs) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5 * float(other.abs().max()) + 1e-5, rtol=1e-3)


def test_layers_that_nobody_runs_cost_nothing_in_training():
    routed = adapted(sink_tokens=0)
    runs = torch.ones(*IDS.shape, 6, dtype=torch.bool)
    runs[..., 3] = False
    calls = []
    for index, layer in enumerate(routed.backbone.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
    routed(IDS, runs=runs).logits.sum().backward()
    assert sorted(set(calls)) == [0, 1, 2, 4, 5]
    idle = [part for name, part in routed.adapter.parts.items() if "-3-" in name]
    assert all(parameter.grad is None for part in idle for parameter in part.parameters())


def test_plans_do_not_go_through_gradient_checkpointing():
    routed = adapted()
    routed.backbone.model.activation_checkpointing_enable()
    routed.backbone.model.train()
    with pytest.raises(BuddyError, match="checkpointing"):
        routed(IDS, executed=EXECUTED)
    with torch.no_grad():
        routed(IDS, executed=EXECUTED)


# Merged


@pytest.mark.parametrize("policy", POLICIES)
def test_merged_it_is_the_same_model_of_stock_modules(policy):
    routed = adapted(policy=policy)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected, hand = routed(IDS, executed=EXECUTED), by_hand(routed.adapter)
    with routed.at(executed=[3]):
        text = routed.backbone.model.generate(IDS, **options)
    routed.merge()
    assert routed.adapter is None
    assert routed.backbone.model.state_dict().keys() == hand.state_dict().keys()
    for name, weight in hand.state_dict().items():
        torch.testing.assert_close(routed.backbone.model.state_dict()[name], weight)
    output = routed(IDS, executed=EXECUTED)
    assert torch.equal(output.runs, expected.runs)
    torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
    with routed.at(executed=[3]):
        assert torch.equal(routed.backbone.model.generate(IDS, **options), text)


def test_weights_that_are_no_numbers_are_not_merged():
    routed = adapted()
    next(iter(routed.adapter.parts.values()))["B"].weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        routed.merge()


# Saved


@pytest.fixture
def saved(tmp_path):
    routed = adapted()
    routed.adapter.save(tmp_path / "adapter")
    return routed, tmp_path / "adapter"


def test_it_is_read_back_bit_for_bit_and_frozen_and_by_peft(saved):
    routed, folder = saved
    assert {path.name for path in folder.iterdir()} == {*FILES}
    other = tiny_backbone("llama")
    adapter = Adapter.load(other, folder)
    assert all(torch.equal(value, factors(routed.adapter)[name]) for name, value in factors(adapter).items())
    assert not any(parameter.requires_grad for parameter in other.model.parameters())
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        model = PeftModel.from_pretrained(tiny_model("llama"), str(folder))
    full = routed(IDS, executed=torch.full((3,), 6)).logits
    torch.testing.assert_close(model(IDS).logits, full, **CLOSE)


def refused(folder) -> str:
    """The sentence with which a folder is refused, which it must be; the backbone stays as it was."""
    backbone = tiny_backbone("llama")
    with pytest.raises(RunError) as caught:
        Adapter.load(backbone, folder)
    assert is_stock(backbone.model)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_cut_file_is_named(saved, name):
    path = saved[1] / name
    path.write_bytes(path.read_bytes()[:20])
    assert name in refused(saved[1])
    path.unlink()
    assert name in refused(saved[1])


def test_an_adapter_of_another_backbone_or_without_a_factor_is_refused(saved):
    with pytest.raises(RunError, match=tiny_backbone("llama").fingerprint):
        Adapter.load(tiny_backbone("llama", seed=1), saved[1])
    tensors = load_tensors(saved[1] / WEIGHTS)
    gone = sorted(tensors)[3]
    save_tensors(saved[1] / WEIGHTS, {name: value for name, value in tensors.items() if name != gone})
    assert gone in refused(saved[1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"r": 3}, WEIGHTS),
        ({"target_modules": ["q_proj"]}, WEIGHTS),
        ({"target_modules": ["elsewhere"]}, "elsewhere"),
        ({"peft_type": "IA3"}, "LoRA"),
        ({"r": "8"}, CONFIG),
    ],
)
def test_a_configuration_of_other_modules_is_refused(saved, change, named):
    path = saved[1] / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert named in refused(saved[1])


# Targets


def test_targets_are_the_linear_modules_of_a_layer():
    backbone = tiny_backbone("phi3")
    assert check_targets(["all-linear"], backbone) == ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]
    assert check_targets(["qkv_proj"], backbone) == ["qkv_proj"]


@pytest.mark.parametrize(
    ("target", "named"), [("q_porj", "did you mean 'q_proj'"), ("lm_head", "all-linear"), ("layers.1.q_proj", "q_proj")]
)
def test_unknown_targets_are_refused(target, named):
    backbone = tiny_backbone("llama")
    with pytest.raises(TrainingError, match=named):
        new_adapter(backbone, targets=["v_proj", target])
    assert is_stock(backbone.model)
