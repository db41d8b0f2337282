"""The embedded SmolLM2: causality, full depth, and exact counts by the learned router."""

import pytest
import torch

from buddy.engine.model import RoutedLM, geometry_of
from buddy.router import Router
from routers.buddy import BuddyRouter
from tests.engine.reference import Fickle, whole_layers

pytestmark = pytest.mark.real
TEXT = "The people of the United States have, in every hour of trial, found in their own good sense a way through."


@pytest.fixture
def tokens(smollm2) -> torch.Tensor:
    return smollm2.tokenizer(TEXT, return_tensors="pt").input_ids


@pytest.fixture
def routed(smollm2):
    """Routes the model by a router made for it; it is stock again after the test."""
    made = []

    def routed(kind: type[Router]) -> RoutedLM:
        torch.manual_seed(0)
        made.append(RoutedLM(smollm2, kind(geometry_of(smollm2))))
        return made[-1]

    yield routed
    for model in made:
        model.detach()


@torch.no_grad()
def test_later_tokens_change_nothing_before_them(routed, tokens):
    model, executed = routed(Fickle), torch.tensor([20])
    with whole_layers():
        whole = model(tokens, executed=executed)
    assert len(whole.runs[0].unique(dim=0)) > 10, "plans should change from token to token"
    for cut in (1, 7, tokens.shape[1] - 1):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + 1234) % 49152
        with whole_layers():
            after = model(changed, executed=executed)
        assert torch.equal(whole.runs[:, :cut], after.runs[:, :cut])
        assert torch.equal(whole.logits[:, :cut], after.logits[:, :cut])
        assert not torch.equal(whole.logits[:, cut], after.logits[:, cut])


@torch.no_grad()
def test_full_depth_equals_stock_exactly(routed, smollm2, tokens):
    expected = smollm2.model(tokens).logits
    model = routed(Fickle)
    assert torch.equal(model(tokens, executed=torch.tensor([30])).logits, expected)
    with model.at(1.0):
        assert torch.equal(smollm2.model(tokens).logits, expected)


@torch.no_grad()
def test_the_learned_router_spends_exactly_what_it_is_asked(routed, tokens):
    model = routed(BuddyRouter)
    torch.nn.init.normal_(model.router.output.weight)
    asked = torch.tensor([26, 22, 15])
    output = model(tokens.expand(3, -1), executed=asked)
    assert len(output.runs[2].unique(dim=0)) > 5
    assert torch.equal(output.executed[:, 1:], asked[:, None].expand(-1, tokens.shape[1] - 1))
    assert (output.executed[:, 0] == 30).all()
