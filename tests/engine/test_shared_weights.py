"""Models that share the weights of another: cut to some layers, without layers, or the head alone."""

import pytest
import torch

from buddy.engine.shared_weights import EmbeddingAndHead, head_logits, pruned_model
from tests.engine.reference import reference_logits, routed_tiny
from tests.tiny import FAMILIES, tiny_model

IDS = torch.randint(3, 259, (2, 14), generator=torch.Generator().manual_seed(0))
KEPT = [0, 2, 3, 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_layers_and_head_equal_the_model(family):
    model = tiny_model(family)
    runs = torch.zeros(2, 14, 6, dtype=torch.bool)
    runs[..., KEPT] = True
    expected = model(IDS).logits
    pruned = pruned_model(model, KEPT)
    torch.testing.assert_close(pruned(IDS).logits, reference_logits(model, IDS, runs), atol=1e-5, rtol=1e-5)
    cache = pruned(IDS[:, :9], use_cache=True).cache
    step = pruned(IDS[:, 9:10], cache=cache, use_cache=True).logits
    torch.testing.assert_close(step[:, 0], pruned(IDS[:, :10]).logits[:, -1], atol=1e-5, rtol=1e-5)
    shell = EmbeddingAndHead(model)
    hidden, inputs = shell.embed(IDS)
    for layer, named in zip(model.model.layers, inputs, strict=True):
        hidden = layer(hidden, **named)
    assert torch.equal(shell.logits(hidden.flatten(0, 1)).view(*IDS.shape, -1), expected)
    states = model.model(IDS, use_cache=False).last_hidden_state
    assert torch.equal(head_logits(model, states), expected)


def test_weights_are_shared_and_the_model_is_left_as_it_was():
    model = tiny_model("gemma2")
    expected, layers, parts = (
        model(IDS).logits,
        model.model.layers,
        {name: id(p) for name, p in model.named_parameters()},
    )
    pruned = pruned_model(model, KEPT)
    EmbeddingAndHead(model).logits(torch.zeros(3, 64))
    assert {id(p) for p in pruned.parameters()} <= set(parts.values())
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1, 2, 3]
    assert model.model.layers is layers
    assert {name: id(p) for name, p in model.named_parameters()} == parts
    assert (model.config.num_hidden_layers, len(model.config.layer_types)) == (6, 6)
    assert torch.equal(model(IDS).logits, expected)


def test_a_routed_model_can_be_pruned_and_goes_on_routing():
    routed = routed_tiny()
    executed = torch.tensor([3, 4])
    before = routed(IDS, executed=executed).logits
    pruned = pruned_model(routed.backbone.model, KEPT)
    with routed.at(executed=[3]):
        inside = pruned(IDS).logits
    assert torch.equal(inside, pruned_model(tiny_model("llama"), KEPT)(IDS).logits)
    assert torch.equal(routed(IDS, executed=executed).logits, before)
