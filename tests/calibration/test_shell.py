"""A model without its layers, against the whole model."""

import pytest
import torch

from buddy.calibration.shell import Shell
from tests.calibration.small import WINDOWS
from tests.tiny import FAMILIES, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_in_through_the_layers_and_out_is_the_model(family):
    model = tiny_model(family)
    shell = Shell(model)
    hidden, inputs = shell.enter(WINDOWS)
    for layer, named in zip(model.model.layers, inputs, strict=True):
        hidden = layer(hidden, **named)
    logits = shell.leave(hidden.flatten(0, 1))
    assert torch.equal(logits.view(*WINDOWS.shape, -1), model(WINDOWS).logits)


def test_the_model_is_left_as_it_was():
    model = tiny_model("gemma2")
    layers, parts = model.model.layers, dict(model.named_parameters())
    shell = Shell(model)
    shell.leave(torch.zeros(3, 64))
    assert model.model.layers is layers
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in parts.items()}
    assert len(model.config.layer_types) == len(layers)


def test_nothing_stays_behind():
    shell = Shell(tiny_model())
    shell.enter(WINDOWS)
    shell.leave(torch.zeros(3, 64))
    assert all(layer.hidden is layer.inputs is layer.given is None for layer in shell._layers)
