"""Ragged choices as rectangles, and attention cut into blocks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from buddy.engine.selection import (
    NAME,
    STOCK,
    WASTE,
    _attend,
    attend_by_blocks,
    attention_blocks,
    groups,
    partition,
    take,
)
from tests.tiny import tiny_backbone

CHOICES = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 200).flatmap(
        lambda length: st.lists(
            st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows
        ).map(torch.tensor)
    )
)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=9))
def test_rows_that_run_are_parted_once_with_little_waste(counts):
    parts = partition(counts)
    assert sorted(row for part in parts for row in part) == [row for row, n in enumerate(counts) if n]
    for part in parts:
        ours = [counts[row] for row in part]
        assert max(ours) * len(ours) <= (1 + WASTE) * sum(ours)


@given(CHOICES)
def test_groups_run_exactly_the_chosen_tokens(chosen):
    ran = torch.zeros_like(chosen)
    for group in groups(chosen, chosen.sum(1).tolist()):
        if group.positions is None:
            ran[group.rows] = True
            continue
        flat, _ = group.flat(chosen.shape[1], group.rows)
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


@given(st.integers(0, 9999), st.integers(1, 3), st.integers(64, 300), st.integers(0, 40))
def test_blocks_lose_no_key(seed, rows, length, past):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, length, generator=generator) < torch.rand(1, generator=generator) * 0.8 + 0.1
    for group in groups(chosen, chosen.sum(1).tolist()):
        if group.positions is None:
            continue
        queries = group.positions.shape[1]
        mask = (torch.arange(-past, length) <= group.positions[..., None])[:, None]
        blocks = attention_blocks(group.positions, mask, length)
        if blocks is None:
            assert queries < 64
            continue
        assert [a for a, _, _ in blocks] == [0, *(b for _, b, _ in blocks[:-1])]
        assert blocks[-1][1] == queries
        assert all(not mask[:, :, a:b, keys:].any() for a, b, keys in blocks)


def test_by_blocks_equals_at_once():
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(0, 200, 2)[None].expand(2, -1)
    query, (key, value) = torch.randn(2, 6, 100, 8), torch.randn(2, 2, 2, 207, 8, generator=generator)
    mask = (torch.arange(-7, 200) <= positions[..., None])[:, None]
    blocks = attention_blocks(positions, mask, 200)
    assert len(blocks) > 2
    got, _ = _attend(torch.nn.Identity(), query, key, value, mask, scaling=0.3, blocks=blocks)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_the_kernel_is_given_back():
    layer = tiny_backbone("llama").layers[0]
    with attend_by_blocks(layer, [(0, 1, 1)]) as option:
        assert option == {"blocks": [(0, 1, 1)]}
        assert layer.self_attn.config._attn_implementation == NAME
    assert layer.self_attn.config._attn_implementation == STOCK
    with pytest.raises(ZeroDivisionError, match="division"), attend_by_blocks(layer, [(0, 1, 1)]):
        raise ZeroDivisionError("division by zero")
    assert layer.self_attn.config._attn_implementation == STOCK


def test_other_kernels_are_left_alone():
    layer = tiny_backbone("gemma2").layers[0]
    with attend_by_blocks(layer, [(0, 1, 1)]) as option:
        assert option == {}
        assert layer.self_attn.config._attn_implementation == "eager"
