"""A physically pruned model: the plan it stands for, on the weights of the whole one."""

import pytest
import torch

from buddy.engine.model import RoutedLM, geometry_of
from buddy.scoring.timing import pruned_model
from tests.engine.reference import Fickle, reference_logits
from tests.tiny import FAMILIES, tiny_backbone

IDS = torch.randint(3, 259, (2, 14), generator=torch.Generator().manual_seed(0))
KEPT = [0, 2, 3, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_plan_that_keeps_its_layers(family):
    model = tiny_backbone(family).model
    runs = torch.zeros(2, 14, 6, dtype=torch.bool)
    runs[..., KEPT] = True
    pruned = pruned_model(model, KEPT)
    torch.testing.assert_close(pruned(IDS).logits, reference_logits(model, IDS, runs), atol=1e-5, rtol=1e-5)


def test_it_shares_its_weights_and_leaves_the_whole_model_alone():
    model = tiny_backbone("llama").model
    before = model(IDS).logits
    pruned = pruned_model(model, KEPT)
    whole = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in pruned.parameters()} <= whole
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1, 2, 3]
    assert torch.equal(model(IDS).logits, before)
    assert model.config.num_hidden_layers == 6


def test_it_decodes_by_cache_as_it_prefills():
    pruned = pruned_model(tiny_backbone("qwen3").model, KEPT)
    cache = pruned(IDS[:, :9], use_cache=True).cache
    step = pruned(IDS[:, 9:10], cache=cache, use_cache=True).logits
    torch.testing.assert_close(step[:, 0], pruned(IDS[:, :10]).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_a_routed_model_can_be_pruned_and_goes_on_routing():
    backbone = tiny_backbone("llama")
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    executed = torch.tensor([3, 4])
    before = routed(IDS, executed=executed).logits
    pruned = pruned_model(backbone.model, KEPT)
    with routed.at(executed=[3]):
        inside = pruned(IDS).logits
    assert torch.equal(inside, pruned_model(tiny_backbone("llama").model, KEPT)(IDS).logits)
    assert torch.equal(routed(IDS, executed=executed).logits, before)
