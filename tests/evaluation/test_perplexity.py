"""Perplexity and KL against plain computations, what evaluations share, and what the bootstrap may claim."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM, geometry_of
from buddy.evaluation.evaluate import evaluate
from buddy.metrics.perplexity import Reference, Scores, with_documents
from buddy.metrics.statistics import loss_interval
from tests.engine.reference import Fickle, reference_logits, routed_tiny
from tests.tiny import FAMILIES, tiny_backbone, tiny_model

PROMPT = 5
IDS = torch.randint(3, 259, (7, 18), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([4, 2, 4, 9, 2, 1, 9])
WINDOWS = Windows(IDS, DOCUMENTS)
KEEP = torch.arange(4, 17)
BUDGETS = [1.0, 0.75, 0.5]


@pytest.fixture(scope="module")
def scores() -> list[Scores]:
    return evaluate(routed_tiny(), WINDOWS, BUDGETS, prompt=PROMPT, batch_size=3)


def plain(logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (N, W − PROMPT) of the tokens after the prompt."""
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none")
    return losses.view(len(IDS), -1)[:, PROMPT - 1 :]


def test_full_depth_is_the_dense_model(scores):
    expected = plain(tiny_model("llama")(IDS).logits)
    assert scores[0].perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-5)
    assert scores[0].mean_kl == pytest.approx(0, abs=1e-5)
    assert scores[0].tokens.sum() == expected.numel() == 7 * (18 - PROMPT)


def test_below_full_depth_it_is_brute_force(scores):
    model = tiny_model("llama")
    runs = routed_tiny()(IDS, executed=torch.full((7,), 4)).runs
    logits = reference_logits(model, IDS, runs)
    dense, less = (x[:, PROMPT - 1 : -1].log_softmax(-1) for x in (model(IDS).logits, logits))
    assert scores[1].layers == 4
    assert scores[1].perplexity == pytest.approx(plain(logits).mean().exp().item(), rel=1e-4)
    expected = F.kl_div(less, dense, log_target=True, reduction="none").sum(-1).mean().item()
    assert scores[1].mean_kl == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01


def test_sums_are_kept_by_document(scores):
    expected = plain(tiny_model("llama")(IDS).logits)
    by_document = [expected[document == DOCUMENTS].sum().item() for document in (1, 2, 4, 9)]
    assert scores[0].loss.tolist() == pytest.approx(by_document, rel=1e-5)
    assert scores[0].tokens.tolist() == [13, 26, 26, 26]


def test_the_batch_size_changes_nothing_but_rounding(scores):
    one = evaluate(routed_tiny(), WINDOWS, BUDGETS, prompt=PROMPT, batch_size=1)
    for left, right in zip(one, scores, strict=True):
        assert left.loss.tolist() == pytest.approx(right.loss.tolist(), rel=1e-4)


def test_a_shared_prompt_gets_one_plan(scores):
    model, seen = routed_tiny(prompt_plan="shared"), []
    model.register_forward_hook(lambda _module, _args, output: seen.append(output.runs))
    shared = evaluate(model, WINDOWS, [0.5], prompt=PROMPT, batch_size=7)
    (runs,) = seen
    assert (runs[:, 1:PROMPT] == runs[:, PROMPT - 1 : PROMPT]).all()
    assert len(runs[0, PROMPT:].unique(dim=0)) > 1
    assert shared[0].loss.sum() != pytest.approx(scores[2].loss.sum(), rel=1e-4)


# What evaluations share


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_stock_models_to_the_bit_the_first_time_and_later(family):
    backbone = tiny_backbone(family)
    expected, reference = backbone.model(IDS, logits_to_keep=KEEP).logits, Reference()
    for _ in range(2):
        assert torch.equal(reference.dense(backbone, IDS, KEEP), expected)


def test_a_batch_is_computed_once_as_long_as_there_is_room():
    backbone, calls = tiny_backbone(), []
    backbone.base.register_forward_hook(lambda *_: calls.append(1))
    states = len(IDS) * len(KEEP) * backbone.hidden_size * 4
    for most, expected in ((states, 1 + 2), (2 * states, 2), (0, 4)):
        reference = Reference(most)
        calls.clear()
        for ids in (IDS, IDS + 1, IDS, IDS + 1):
            reference.dense(backbone, ids, KEEP)
        assert len(calls) == expected


def test_sharing_changes_no_number_and_full_depth_runs_once():
    backbone, reference, forwards = tiny_backbone(), Reference(), []
    budgets, options = [1.0, 0.99, 0.75, 0.5], {"prompt": PROMPT, "batch_size": 3}
    for seed in (1, 2):
        model = RoutedLM(backbone, Fickle(geometry_of(backbone), seed))
        alone = evaluate(model, WINDOWS, budgets, **options)
        model.register_forward_hook(lambda *_, seed=seed: forwards.append(seed))
        shared = evaluate(model, WINDOWS, budgets, reference=reference, **options)
        model.detach()
        assert with_documents(alone) == with_documents(shared)
    assert (forwards.count(1), forwards.count(2)) == (9, 6), "three batches at three depths, then at two"


def test_equal_windows_count_each():
    backbone = tiny_backbone()
    model = RoutedLM(backbone, Fickle(geometry_of(backbone)))
    twice = Windows(WINDOWS.input_ids[:1].repeat(2, 1), torch.tensor([0, 1]))
    found = evaluate(model, twice, [1.0, 0.5], prompt=PROMPT, batch_size=1)
    model.detach()
    assert [len(each.tokens) for each in found] == [2, 2]
    assert found[0].tokens.sum() == found[1].tokens.sum()


# The bootstrap


def test_the_interval_holds_the_perplexity_and_is_the_same_every_time(scores):
    for each in scores:
        low, high = each.interval()
        assert low < each.perplexity < high
        assert each.interval() == (low, high)
        assert np.log((low, high)) == pytest.approx(loss_interval(each.loss[None], each.tokens), rel=1e-3)
