"""Remembered sinks: the same result as running them, for their tokens, positions and weights alone."""

import contextlib

import pytest
import torch

from buddy.engine.model import RoutedLM, geometry_of
from tests.engine.reference import Fickle
from tests.tiny import FAMILIES, tiny_backbone

IDS = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(1))


def routed_tiny(family: str = "llama", **options) -> RoutedLM:
    backbone = tiny_backbone(family)
    return RoutedLM(backbone, Fickle(geometry_of(backbone)), prompt_plan="shared", batch_plan="shared", **options)


@torch.no_grad()
def prompt_and_step(routed: RoutedLM, ids: torch.Tensor, **options) -> torch.Tensor:
    """Logits of a prompt and of one token after it."""
    model = routed.backbone.model
    with routed.at(executed=[3]):
        prompt = model(ids[:, :-1], use_cache=True, **options)
        step = model(ids[:, -1:], cache=prompt.cache, use_cache=True)
    return torch.cat([prompt.logits, step.logits], 1)


@torch.no_grad()
def without_memory(routed: RoutedLM, ids: torch.Tensor, **options) -> torch.Tensor:
    """The same with every sink run through every layer."""
    routed._hooks.sink_states = lambda *_: None
    try:
        return prompt_and_step(routed, ids, **options)
    finally:
        del routed._hooks.sink_states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sinks", [1, 2])
def test_remembered_sinks_change_nothing(family, sinks):
    routed = routed_tiny(family, sink_tokens=sinks)
    expected = without_memory(routed, IDS)
    for _ in range(2):  # computed, then remembered
        torch.testing.assert_close(prompt_and_step(routed, IDS), expected, atol=1e-5, rtol=1e-4)
    assert len(routed._hooks.sinks._held) == 3


def test_a_beginning_is_computed_once(monkeypatch):
    routed = routed_tiny()
    prompt_and_step(routed, IDS)
    monkeypatch.setattr(routed._hooks.sinks, "_computed", lambda ids: pytest.fail(f"computed {ids.tolist()} again"))
    torch.testing.assert_close(prompt_and_step(routed, IDS.flip(0)), prompt_and_step(routed, IDS).flip(0))


def test_a_result_does_not_depend_on_what_was_remembered():
    fresh, used = routed_tiny(), routed_tiny()
    prompt_and_step(used, torch.cat([IDS[:1, :1], IDS[1:2, 1:]], 1))  # another prompt of the same beginning
    assert torch.equal(prompt_and_step(fresh, IDS[:1]), prompt_and_step(used, IDS[:1]))


def test_changed_weights_are_not_answered_from_memory():
    routed = routed_tiny()
    before = prompt_and_step(routed, IDS)
    with torch.no_grad():
        routed.backbone.layers[2].mlp.down_proj.weight.mul_(1.5)
    after = prompt_and_step(routed, IDS)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, without_memory(routed, IDS), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("change", ["hook", "autocast", "adapters"])
def test_what_depends_on_more_than_tokens_is_run(change):
    """Compared with a model that remembers nothing, after the memory was filled without the change."""
    routed = routed_tiny()
    prompt_and_step(routed, IDS)
    layer, context = routed.backbone.layers[2].mlp, contextlib.nullcontext()
    if change == "hook":
        layer.register_forward_hook(lambda _, __, out: out * 2)
    elif change == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    else:
        layer.down_proj.__class__ = Switched
    with context:
        for switch in (False, True):
            layer.down_proj.__dict__["_disable_adapters"] = switch
            expected = without_memory(routed, IDS)
            torch.testing.assert_close(prompt_and_step(routed, IDS), expected, atol=1e-5, rtol=1e-4)


class Switched(torch.nn.Linear):
    """A layer with an adapter that can be switched off, as peft's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (1.0 if self._disable_adapters else 3.0)


@torch.no_grad()
def test_several_sinks_are_run_where_the_rotation_depends_on_the_length():
    routed = routed_tiny(sink_tokens=2)
    routed.backbone.base.config.rope_parameters["rope_type"] = "dynamic"
    assert routed._hooks.sinks.states(IDS[:, :2]) is None
    assert routed._hooks.sinks.states(IDS[:, :1]) is not None


def test_weights_made_under_inference_mode_serve():
    expected = prompt_and_step(routed_tiny(), IDS)
    with torch.inference_mode():
        torch.testing.assert_close(prompt_and_step(routed_tiny(), IDS), expected, atol=1e-5, rtol=1e-4)


def test_memory_is_let_go():
    routed = routed_tiny()
    prompt_and_step(routed, IDS)
    routed.forget_sinks()
    assert not routed._hooks.sinks._held


def test_other_positions_are_run():
    routed = routed_tiny()
    positions = torch.arange(5, 5 + IDS.shape[1] - 1)[None]
    expected = without_memory(routed, IDS, position_ids=positions)
    torch.testing.assert_close(prompt_and_step(routed, IDS, position_ids=positions), expected, atol=1e-5, rtol=1e-4)


def test_the_sinks_count_as_run():
    routed = routed_tiny()
    with torch.no_grad(), routed.at(executed=[3]) as record:
        routed.backbone.model(IDS, use_cache=True)
    executed = record.forwards[0].executed
    assert (executed[:, 0] == routed.geometry.layers).all()
    assert (executed[:, 1:] == 3).all()


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("buddy.engine.sinks.KEPT", 2)
    routed = routed_tiny()
    prompt_and_step(routed, IDS)
    assert list(routed._hooks.sinks._held) == [(int(row[0]),) for row in IDS[1:]]


def test_the_memory_is_asked_once_a_prompt_even_where_it_has_no_answer():
    routed, asked = routed_tiny(), []
    routed._hooks.sinks.states = lambda ids, positions: asked.append(ids.shape)  # None: not known
    prompt_and_step(routed, IDS)
    assert asked == [(3, 1)]
