"""What a router may measure, against brute force on a fresh stock model."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from buddy.calibration import Probe
from buddy.engine.model import RoutedLM, geometry_of
from tests.engine.reference import Fickle, reference_logits
from tests.tiny import tiny_backbone, tiny_model

WINDOWS = torch.randint(3, 259, (5, 20), generator=torch.Generator().manual_seed(0))
SINKS = 1


def probe(context_layer: int = 1, batch_size: int = 2, **options) -> Probe:
    backbone = tiny_backbone("llama")
    routed = RoutedLM(backbone, Fickle(geometry_of(backbone, context_layer)), sink_tokens=SINKS)
    return Probe(routed, WINDOWS, batch_size, **options)


def loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())


@pytest.mark.parametrize("context_layer", [1, 2])
def test_block_influence(context_layer):
    model, seen = tiny_model("llama"), {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda _, args, out, index=index: seen.update({index: (args[0], out)}))
    model(WINDOWS)
    routable = range(context_layer, 5)
    expected = [
        1 - F.cosine_similarity(before[:, SINKS:], after[:, SINKS:], dim=-1).mean()
        for before, after in (seen[index] for index in routable)
    ]
    torch.testing.assert_close(probe(context_layer).block_influence, torch.stack(expected), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("context_layer", [1, 2])
def test_loss_increase(context_layer):
    model, rises = tiny_model("llama"), []
    for skipped in range(context_layer, 5):
        runs = torch.ones(*WINDOWS.shape, 6, dtype=torch.bool)
        runs[:, SINKS:, skipped] = False
        rises.append(loss(reference_logits(model, WINDOWS, runs)).exp() - loss(model(WINDOWS).logits).exp())
    torch.testing.assert_close(probe(context_layer).loss_increase, torch.stack(rises), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_taylor(batch_size):
    model = tiny_model("llama").requires_grad_(True)
    loss(model(WINDOWS).logits).backward()
    expected = [
        sum((p * p.grad).abs().sum() for name, p in model.model.layers[index].named_parameters() if "norm" not in name)
        for index in range(1, 5)
    ]
    torch.testing.assert_close(probe(batch_size=batch_size).taylor, torch.stack(expected), atol=1e-4, rtol=1e-4)


def is_frozen(model: torch.nn.Module) -> bool:
    return not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_after_taylor_the_model_is_frozen_again():
    measured = probe()
    assert (measured.taylor > 0).all()
    assert is_frozen(measured.routed.backbone.model)


def test_a_stopped_taylor_leaves_the_model_frozen():
    def stop_after_one(batches, _):
        yield batches[0]
        raise KeyboardInterrupt

    measured = probe(track=stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        _ = measured.taylor
    assert is_frozen(measured.routed.backbone.model)


@pytest.mark.parametrize(
    ("measure", "words"),
    [
        ("block_influence", ["block influence"]),
        ("loss_increase", ["perplexity without a layer"]),
        ("taylor", ["Taylor importance"]),
    ],
)
def test_nothing_is_measured_twice(measure, words):
    shown = []

    def track(items, said):
        shown.append(said)
        return items

    measured = probe(track=track)
    assert getattr(measured, measure) is getattr(measured, measure)
    assert shown == words


def test_the_loss_under_a_plan_is_over_all_windows():
    measured = probe(batch_size=3)  # batches of three and two
    whole = torch.ones(6, dtype=torch.bool)
    assert measured.loss(whole) == pytest.approx(loss(tiny_model("llama")(WINDOWS).logits).item(), rel=1e-5)
