"""What every router inherits."""

import pytest
import torch
from torch import nn

from buddy import BudgetError, Geometry, LayerwiseRouter, Router
from tests.engine.reference import Fickle, FickleGates


def test_geometry_counts_its_layers():
    geometry = Geometry(layers=30, context_layer=3, hidden=8, features=4)
    assert (geometry.routable, geometry.always_on) == (26, 4)


@pytest.mark.parametrize("context_layer", [0, 5])
def test_a_context_layer_that_leaves_nothing_to_route_is_refused(context_layer):
    with pytest.raises(BudgetError, match="context_layer from 1 to 4"):
        Geometry(layers=6, context_layer=context_layer, hidden=8, features=4)


def test_a_router_must_score():
    class Silent(Router):
        pass

    with pytest.raises(TypeError, match="score"):
        Silent(Geometry(6, 1, 8, 4))


def test_trainable_is_read_off_the_parameters():
    router = Fickle(Geometry(6, 1, 8, 4))
    assert not router.trainable
    router.bias = nn.Parameter(torch.zeros(4))
    assert router.trainable
    assert router.parameter_groups() == [{"params": [router.bias], "scale": 1.0}]


def test_what_a_class_says_of_itself_is_inherited():
    class Searching(Router):
        seeded = True

    class Search(Searching):
        pass

    class Learned(Search):
        kind = "learned"

    class Fixed(Learned):
        kind = "static"

    assert [each.seeded for each in (Router, Searching, Search, Learned, Fixed)] == [False, True, True, True, False]


def test_a_layerwise_router_must_have_gates():
    class Gateless(LayerwiseRouter):
        pass

    with pytest.raises(TypeError, match="gate"):
        Gateless(Geometry(6, 1, 8, 4))


def test_a_gate_weighs_by_its_probability_and_costs_nothing_unless_the_class_says_otherwise():
    router, logits = FickleGates(Geometry(6, 1, 8, 4)), torch.tensor([-1.0, 0.0, 2.0])
    assert torch.equal(router.weigh(logits), logits.sigmoid())
    assert router.penalty(torch.rand(3, 5, 4), torch.tensor([3, 4, 6])).tolist() == [0, 0, 0]
    assert router.scope == "token"
