"""Attention by blocks equals attention at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from buddy.engine.selection import NAME, STOCK, _attend, attend_by_blocks, attention_blocks, groups
from tests.tiny import tiny_backbone


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
