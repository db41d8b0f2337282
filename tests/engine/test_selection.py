"""Ragged choices as rectangles."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from buddy.engine.selection import WASTE, groups, partition, take


@st.composite
def choices(draw) -> torch.Tensor:
    """(B, T) bool, with any share of chosen tokens in each row."""
    length, shares = draw(st.integers(1, 200)), st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
    rows = torch.tensor(draw(st.lists(shares, min_size=1, max_size=5)))[:, None]
    return torch.rand(len(rows), length, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))) < rows


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9))
def test_rows_that_run_are_parted_once_with_little_waste(counts):
    parts = partition(counts)
    assert sorted(row for part in parts for row in part) == [row for row, n in enumerate(counts) if n]
    for part in parts:
        ours = [counts[row] for row in part]
        assert max(ours) * len(ours) <= (1 + WASTE) * sum(ours)


@given(choices())
def test_groups_run_exactly_the_chosen_tokens(chosen):
    ran = torch.zeros_like(chosen)
    for group in groups(chosen, chosen.sum(1).tolist()):
        if group.positions is None:
            ran[group.rows] = True
            continue
        flat = group.flat(chosen.shape[1], group.rows)
        assert not ran.view(-1)[flat].any()
        ran.view(-1)[flat] = True
        skipped = torch.zeros_like(chosen[group.rows]).scatter_(1, group.rest, True)
        assert (skipped | chosen[group.rows]).all(), "rest should hold all that do not run"
    assert torch.equal(ran, chosen)


def test_take_selects_rows_and_positions():
    x = torch.arange(2 * 5 * 3).view(2, 5, 3)
    rows, positions = torch.tensor([1, 0]), torch.tensor([[4, 0], [1, 2]])
    expected = torch.stack([x[1][[4, 0]], x[0][[1, 2]]])
    assert torch.equal(take(x, rows, positions, 2), expected)
    assert torch.equal(take(x, rows, None, 2), x[rows])
    assert torch.equal(take(x[:1], rows, positions, 2), torch.stack([x[0][[4, 0]], x[0][[1, 2]]]))
    assert torch.equal(take(x[:1], rows[1:], None, 1), x[:1])
