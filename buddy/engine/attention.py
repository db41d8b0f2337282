"""Attention of selected queries, block by block.

A causal kernel leaves out the half of the products that lie ahead of the queries; one with a mask computes them and
throws them away. Queries in rising order need, block by block, only the keys up to their last, which wins most of that
half back. Only the attention product is cut: the layer's other products stay whole, since small ones are slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME, STOCK = "sdpa_by_blocks", "sdpa"
LEAST, MOST = 32, 8  # queries in a block at least, and blocks at most
Blocks = list[tuple[int, int, int]]


def blocks_of(positions: Tensor, mask: Tensor | None, length: int) -> Blocks | None:
    """(first query, end, keys needed) of each block of queries, or None where one call is best.

    On an accelerator the kernel is fast and asking for the bounds would wait for it, so only CPUs have blocks.

    Args:
        positions: (G, n) long, rising in each row but for filling at the end.
        mask: (G, 1, n, S), whose last `length` keys are the new positions.
        length: T.
    """
    pieces = min(MOST, positions.shape[1] // LEAST)
    if mask is None or pieces < 2 or positions.device.type != "cpu":
        return None
    bounds = [positions.shape[1] * piece // pieces for piece in range(pieces + 1)]
    needed = (positions.amax(0).cummax(0).values + (mask.shape[-1] - length + 1)).tolist()
    return [(a, b, needed[b - 1]) for a, b in pairwise(bounds)]


@contextmanager
def by_blocks(layer: nn.Module, blocks: Blocks | None) -> Iterator[dict[str, Blocks]]:
    """Within this, the layer's forward takes what is given here as an option; nothing where it runs another kernel."""
    config = layer.self_attn.config
    if blocks is None or config._attn_implementation != STOCK:
        yield {}
        return
    config._attn_implementation = NAME
    try:
        yield {"blocks": blocks}
    finally:
        config._attn_implementation = STOCK


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    blocks: Blocks | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: query (G, heads, n, size), key and value (G, kv heads, S, size)."""
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, first:end],
            key[:, :, :keys],
            value[:, :, :keys],
            attn_mask=attention_mask[:, :, first:end, :keys],
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for first, end, keys in blocks
    ]
    return torch.cat(parts, 2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
