"""Keys and values by one product: the same to the bit, nothing held twice, and given back."""

import copy

import pytest
import torch
from torch import nn

from buddy.engine.layers import Both, Lean, adjoin, projected, separate
from buddy.engine.model import RoutedLM, geometry_of
from tests.engine.reference import Fickle
from tests.healing.made import new_adapter, stirred
from tests.tiny import FAMILIES, tiny_backbone, tiny_model

PLAIN = {"llama", "qwen3", "mistral", "mistral-sliding", "gemma2", "gemma3", "smollm3"}  # two projections without bias


def attention(family: str = "llama") -> nn.Module:
    return tiny_model(family).model.layers[2].self_attn


def weights(part: nn.Module) -> list[torch.Tensor]:
    return [part.k_proj.weight, part.v_proj.weight]


def storages(part: nn.Module) -> set[int]:
    return {weight.untyped_storage().data_ptr() for weight in weights(part)}


def test_the_weight_of_both_is_a_view_of_the_modules_own():
    part, stock = attention(), attention()
    held = weights(part)
    adjoin(part)
    found = Both()(part)
    assert torch.equal(found, torch.cat(weights(stock)))
    assert {found.untyped_storage().data_ptr()} == storages(part)
    assert found.untyped_storage().nbytes() == found.nbytes, "and nothing else is in that storage"
    assert all(one is other for one, other in zip(held, weights(part), strict=True))
    with torch.no_grad():
        part.v_proj.weight[0] = 7.0
    assert (found[part.k_proj.out_features] == 7.0).all()


def test_each_has_a_storage_of_its_own_again_after_separate():
    part, stock = attention(), attention()
    adjoin(part)
    separate(part)
    assert len(storages(part)) == 2
    assert Both()(part) is None
    assert all(torch.equal(*pair) for pair in zip(weights(part), weights(stock), strict=True))


def test_nothing_is_laid_anew_that_lies_side_by_side():
    part = attention()
    adjoin(part)
    before = storages(part)
    adjoin(part)
    assert storages(part) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda part: setattr(part, "k_proj", copy.deepcopy(part.k_proj)),
        lambda part: setattr(part.v_proj, "weight", nn.Parameter(part.v_proj.weight.clone(), requires_grad=False)),
        lambda part: setattr(part.v_proj.weight, "data", part.v_proj.weight.clone()),
        lambda part: part.double(),
        lambda part: part.k_proj.register_forward_hook(lambda *_: None),
        lambda part: part.v_proj.register_forward_pre_hook(lambda *_: None),
        lambda part: part.v_proj.requires_grad_(True),
        lambda part: setattr(part, "v_proj", nn.Sequential(part.v_proj)),
    ],
)
def test_there_is_no_product_of_both_after_a_change(change):
    part, both = attention(), Both()
    adjoin(part)
    assert both(part) is not None
    change(part)
    assert both(part) is None


def test_a_bias_a_fused_projection_or_a_trained_weight_is_left_alone():
    for family in ("qwen2", "phi3"):
        part = attention(family)
        adjoin(part)
        assert Both()(part) is None
    part = attention().requires_grad_(True)
    adjoin(part)
    assert len(storages(part)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_routed_family_writes_what_its_own_functions_write(family):
    backbone = tiny_backbone(family)
    RoutedLM(backbone, Fickle(geometry_of(backbone)))
    layer = backbone.layers[3]
    if family == "phi3":
        assert layer._write_kv.__name__ == "captured"
        return
    assert isinstance(layer._write_kv, Lean)
    assert (Both()(layer.self_attn) is not None) == (family in PLAIN)
    for length in (1, 5):
        hidden = torch.randn(2, length, 64, generator=torch.Generator().manual_seed(length))
        angles = torch.linspace(0, 3, length * layer.self_attn.head_dim).view(1, length, -1)
        embeddings = angles.cos(), angles.sin()
        for ours, theirs in zip(
            layer._write_kv(layer, hidden, embeddings), projected(layer, hidden, embeddings), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_routed_model_gives_separate_weights_back_and_keeps_memory_as_it_was():
    backbone = tiny_backbone()
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    assert all(len(storages(layer.self_attn)) == 1 for layer in backbone.layers)
    routed.detach()
    assert all(len(storages(layer.self_attn)) == 2 for layer in backbone.layers)


def test_an_adapter_has_its_say_in_what_is_owed():
    backbone = tiny_backbone()
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    layer, hidden = backbone.layers[3], torch.ones(1, 2, 64)
    angles = torch.linspace(0, 1, 2 * layer.self_attn.head_dim).view(1, 2, -1)
    embeddings = angles.cos(), angles.sin()
    stock = layer._write_kv(layer, hidden, embeddings)
    adapter = stirred(new_adapter(backbone))
    routed.adapt(adapter)
    for ours, theirs, before in zip(
        layer._write_kv(layer, hidden, embeddings), projected(layer, hidden, embeddings), stock, strict=True
    ):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, before)
    routed.merge()
    assert Both()(layer.self_attn) is not None, "what was merged lies side by side again"
    merged = layer._write_kv(layer, hidden, embeddings)
    assert not torch.allclose(merged[1], stock[1])
