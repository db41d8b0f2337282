"""What evaluations share: the dense model's states, and full depth."""

import numpy as np
import pytest
import torch

from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM, geometry_of
from buddy.evaluation.evaluate import evaluate
from buddy.metrics.perplexity import Reference, Scores
from tests.engine.reference import Fickle
from tests.tiny import FAMILIES, tiny_backbone

IDS = torch.randint(3, 258, (5, 18), generator=torch.Generator().manual_seed(0))
WINDOWS = Windows(IDS, torch.tensor([0, 1, 1, 2, 3]))
KEEP = torch.arange(4, 17)


def assert_equal(one: Scores, other: Scores) -> None:
    for name in ("budget", "layers", "executed", "sinks"):
        assert getattr(one, name) == getattr(other, name)
    for name in ("loss", "kl", "tokens"):
        assert np.array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_stock_models_to_the_bit_the_first_time_and_later(family):
    backbone = tiny_backbone(family)
    expected, reference = backbone.model(IDS, logits_to_keep=KEEP).logits, Reference()
    for _ in range(2):
        assert torch.equal(reference.dense(backbone, IDS, KEEP), expected)


def test_a_batch_is_computed_once_as_long_as_there_is_room():
    backbone, calls = tiny_backbone(), []
    backbone.base.register_forward_hook(lambda *_: calls.append(1))
    states = IDS.shape[0] * len(KEEP) * backbone.hidden_size * 4
    for most, expected in ((states, 1 + 2), (2 * states, 2), (0, 4)):
        reference = Reference(most)
        calls.clear()
        for ids in (IDS, IDS + 1, IDS, IDS + 1):
            reference.dense(backbone, ids, KEEP)
        assert len(calls) == expected


def test_sharing_changes_no_number_and_full_depth_runs_once():
    backbone, reference, forwards = tiny_backbone(), Reference(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        routed = RoutedLM(backbone, Fickle(geometry_of(backbone)))
        options = {"prompt": 5, "batch_size": 2}
        alone = evaluate(routed, WINDOWS, [1.0, 0.99, 0.75, 0.5], **options)
        routed.register_forward_hook(lambda *_, seed=seed: forwards.append(seed))
        shared = evaluate(routed, WINDOWS, [1.0, 0.99, 0.75, 0.5], reference=reference, **options)
        routed.detach()
        for one, other in zip(alone, shared, strict=True):
            assert_equal(one, other)
    assert (forwards.count(1), forwards.count(2)) == (9, 6), "three batches at three depths, then at two"
