"""The sink's states are kept between prompts, and no result depends on whether they were."""

from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model

from buddy.engine.model import RoutedLM
from buddy.engine.sinks import SinkMemory
from tests.engine.reference import routed_tiny
from tests.tiny import FAMILIES

IDS = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(1))
IDS[:, 0] = 7
SHARED = {"prompt_plan": "shared", "batch_plan": "shared"}


@torch.no_grad()
def prompt_and_step(routed: RoutedLM, ids: torch.Tensor, **options) -> torch.Tensor:
    """Logits of a prompt and of one token after it, whose budget lets the sink alone run some layers."""
    with routed.at(executed=[3]) as record:
        prompt = routed.backbone.model(ids[:, :-1], use_cache=True, **options)
        step = routed.backbone.model(ids[:, -1:], cache=prompt.cache, use_cache=True)
    assert (record.executed[0][:, 0] == 6).all()
    assert (record.executed[0][:, 1:] == 3).all()
    return torch.cat([prompt.logits, step.logits], 1)


def layer_calls(routed: RoutedLM, ids: torch.Tensor) -> int:
    """How often a layer's MLP runs in `prompt_and_step`."""
    calls, mlp = [], routed.backbone.layers[2].mlp
    forward = mlp.forward
    mlp.forward = lambda x: calls.append(x.shape) or forward(x)
    prompt_and_step(routed, ids)
    mlp.forward = forward
    return len(calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_sinks_change_nothing(family):
    routed, forgetful = routed_tiny(family, **SHARED), routed_tiny(family, **SHARED)
    forgetful.backbone.layers[0].mlp.register_forward_hook(lambda *_: None)  # with a hook nothing is kept
    expected = prompt_and_step(forgetful, IDS)
    first = prompt_and_step(routed, IDS)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(prompt_and_step(routed, IDS), first)


def test_kept_sinks_change_nothing_beside_bridges():
    routed, forgetful = (routed_tiny(bridges=True, **SHARED) for _ in range(2))
    forgetful.backbone.layers[0].mlp.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(prompt_and_step(routed, IDS), prompt_and_step(forgetful, IDS), atol=1e-5, rtol=1e-4)


def test_a_result_does_not_depend_on_earlier_prompts():
    fresh, used = routed_tiny(**SHARED), routed_tiny(**SHARED)
    prompt_and_step(used, torch.cat([IDS[1:, :9], IDS[1:, 12:]], 1))
    assert torch.equal(prompt_and_step(fresh, IDS[:1]), prompt_and_step(used, IDS[:1]))


def test_the_sink_is_not_run_again():
    routed = routed_tiny(**SHARED)
    assert layer_calls(routed, IDS) - layer_calls(routed, IDS.flip(0)) == 1


@torch.no_grad()
def test_changed_weights_are_seen():
    routed = routed_tiny(**SHARED)
    before = prompt_and_step(routed, IDS)
    fresh = routed_tiny(**SHARED)
    for model in (routed, fresh):
        model.backbone.layers[2].mlp.down_proj.weight.mul_(1.5)
    after = prompt_and_step(routed, IDS)
    assert not torch.allclose(before, after)
    assert torch.equal(after, prompt_and_step(fresh, IDS))


@pytest.mark.filterwarnings("ignore:.*peft_config:UserWarning", "ignore:.*is_gradient_checkpointing:FutureWarning")
@torch.no_grad()
def test_adapters_of_the_users_own_that_are_switched_or_scaled_are_seen():
    routed, config = routed_tiny(**SHARED), LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
    adapted = get_peft_model(routed.backbone.model, config, "first")
    adapted.add_adapter("second", config)
    seen = []

    def scale() -> None:
        for layer in routed.backbone.layers:
            layer.mlp.down_proj.scale_layer(3.0)

    for change in (lambda: None, lambda: adapted.set_adapter("second"), scale):
        change()
        kept = prompt_and_step(routed, IDS)
        routed._hooks._sinks = SinkMemory()
        torch.testing.assert_close(kept, prompt_and_step(routed, IDS), atol=1e-5, rtol=1e-4)
        seen.append(kept)
    assert not any(torch.allclose(one, other) for one, other in pairwise(seen))


@torch.no_grad()
def test_other_positions_and_other_precisions_are_not_mixed_up():
    routed = routed_tiny(**SHARED)
    prompt_and_step(routed, IDS)
    positions = torch.arange(5, 5 + IDS.shape[1] - 1)[None]
    expected = prompt_and_step(routed_tiny(**SHARED), IDS, position_ids=positions)
    assert torch.equal(prompt_and_step(routed, IDS, position_ids=positions), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prompt_and_step(routed, IDS), prompt_and_step(routed_tiny(**SHARED), IDS))


def test_nothing_is_kept_where_each_token_has_a_plan():
    routed = routed_tiny()
    routed.router.kind = "learned"
    before = layer_calls(routed, IDS)
    assert layer_calls(routed, IDS) == before


@torch.no_grad()
def test_what_a_hook_is_given_does_not_change_later():
    routed, given = routed_tiny(prompt_plan="shared"), []
    for layer in routed.backbone.layers[1:]:
        layer.register_forward_pre_hook(lambda _, args: given.append((args[0], args[0].clone())))
    with routed.at(executed=[2]):
        routed.backbone.model(IDS[:1], use_cache=True)
    assert given
    assert all(torch.equal(now, then) for now, then in given)
