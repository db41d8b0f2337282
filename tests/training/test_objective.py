"""Losses against torch's own, and budget draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from buddy.losses import DenseDistribution, Objective, cross_entropy, draw_budgets, kl_and_cross_entropy, kl_to_dense


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(2, 11, 50, generator=torch.Generator().manual_seed(seed))


def test_kl_of_a_model_to_itself_is_nought():
    assert torch.equal(kl_to_dense(DenseDistribution(logits(0)), logits(0)), torch.zeros(2, 11))


def test_both_in_one_pass_are_the_same():
    targets, dense = torch.arange(22).view(2, 11), DenseDistribution(logits(1))
    kl, ce = kl_and_cross_entropy(dense, logits(0), targets)
    assert torch.equal(kl, kl_to_dense(dense, logits(0)))
    assert torch.equal(ce, cross_entropy(logits(0), targets))


def test_rows_of_the_dense_distribution_can_be_taken():
    rows = torch.tensor([1])
    torch.testing.assert_close(
        kl_to_dense(DenseDistribution(logits(0))[rows], logits(1)[rows]),
        kl_to_dense(DenseDistribution(logits(0)), logits(1))[rows],
    )


@pytest.mark.parametrize(("kl", "ce"), [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_objective_is_the_weighted_sum(kl, ce):
    targets, dense = torch.arange(22).view(2, 11), DenseDistribution(logits(1))
    expected = kl * kl_to_dense(dense, logits(0)) + ce * cross_entropy(logits(0), targets)
    torch.testing.assert_close(Objective(kl, ce)(dense, logits(0), targets), expected)


@given(st.lists(st.integers(2, 30), min_size=1, max_size=6, unique=True), st.integers(1, 20), st.integers(0, 99))
def test_budget_draws_use_up_the_grid_before_they_repeat(grid, rows, seed):
    drawn = draw_budgets(grid, rows, torch.Generator().manual_seed(seed)).tolist()
    assert len(drawn) == rows
    for start in range(0, rows, len(grid)):
        part = drawn[start : start + len(grid)]
        assert len(set(part)) == len(part)
        assert set(part) <= set(grid)


def test_losses_of_many_tokens_in_parts_equal_torch():
    one, two = (torch.randn(2, 2000, 50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    targets = torch.arange(4000).view(2, 2000) % 50
    expected = F.cross_entropy(one.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(cross_entropy(one, targets), expected)
    expected = F.kl_div(one.log_softmax(-1), two.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl_to_dense(DenseDistribution(two), one), expected, atol=1e-5, rtol=1e-5)
