"""What is drawn belongs to a window's place in the whole batch: shares of it learn what the whole does."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from buddy.engine.model import RoutedLM, geometry_of
from buddy.losses import Objective
from buddy.training.estimators import Perturbed, StraightThrough, Surrogate, TrainingBatch, Weighted
from routers.buddy import BuddyRouter
from routers.first import FiRST
from tests.tiny import tiny_backbone

IDS = torch.randint(3, 259, (6, 24), generator=torch.Generator().manual_seed(0))


def shares(whole: TrainingBatch, processes: int) -> list[TrainingBatch]:
    """What each of so many processes gets of a batch."""
    places = [slice(rank, None, processes) for rank in range(processes)]
    return [
        replace(
            whole, input_ids=whole.input_ids[at], executed=whole.executed[at], all_executed=whole.executed, rank=rank
        )
        for rank, at in enumerate(places)
    ]


def gradient(routed: RoutedLM, estimator, batch: TrainingBatch) -> torch.Tensor:
    routed.router.zero_grad()
    estimator(routed, batch, torch.Generator().manual_seed(3)).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in routed.router.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("executed", [[3, 4, 3, 5, 4, 3], [3, 6, 4, 6, 6, 3], [6, 3, 6, 4, 6, 5]])
@pytest.mark.parametrize("kind", [Perturbed, StraightThrough, Surrogate, Weighted])
def test_the_mean_gradient_of_the_shares_is_that_of_the_batch(kind, executed):
    """Also where some rows are at full depth, which have nothing to learn from, and some shares have no others."""
    backbone = tiny_backbone("llama")
    torch.manual_seed(0)
    routed = RoutedLM(backbone, (FiRST if kind is Weighted else BuddyRouter)(geometry_of(backbone)))
    with torch.no_grad():
        for parameter in routed.router.parameters():
            parameter.normal_()
    whole, estimator = TrainingBatch(IDS, torch.tensor(executed), torch.arange(4, 23), 5), kind(Objective())
    expected, parts = gradient(routed, estimator, whole), shares(whole, 2)
    found = torch.stack([gradient(routed, estimator, share) for share in parts]).mean(0)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    if kind in (Perturbed, Surrogate):  # each by itself would draw other noise
        apart = [gradient(routed, estimator, replace(share, all_executed=None, rank=0)) for share in parts]
        assert (torch.stack(apart).mean(0) - expected).abs().max() > 1e-3


@given(st.lists(st.integers(3, 6), min_size=1, max_size=12), st.integers(1, 6))
def test_every_row_is_in_one_place(executed, processes):
    all_executed = torch.tensor(executed * processes)
    rows = torch.arange(len(all_executed))[:, None]
    parts = shares(TrainingBatch(rows, all_executed, torch.arange(0)), processes)
    free = rows[all_executed < 6, 0]
    seen = {}
    for part in parts:
        here, total = part.rows_below(6)
        assert total == len(free)
        mine = part.input_ids[part.executed < 6, 0]
        assert free[here].tolist() == mine.tolist()
        seen |= dict(zip(here.tolist(), mine.tolist(), strict=True))
    assert sorted(seen.values()) == free.tolist()
    assert sum(part.weight(6) for part in parts) == pytest.approx(processes)
