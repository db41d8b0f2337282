"""Which tokens a layer runs on, in as few rectangular calls as cost nothing much.

A layer of the stock model takes rectangles (rows × tokens). The tokens that chose it are ragged: each row has its own
number. Rows with similar numbers share a call, filled up with tokens that did not choose the layer and whose output is
dropped; rows with very different numbers get calls of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WASTE = 0.15  # the share of a call that may be filling


@dataclass(frozen=True)
class Group:
    """One call of a layer.

    Attributes:
        rows: (G,) long, rows of the batch.
        order: (G, T) long, a permutation of each row's positions whose first `length` entries run: those chosen, in
            rising order, then filling. None where every token runs.
        length: tokens per row in this call.
        counts: (G,) long, how many of the `length` were chosen.
    """

    rows: Tensor
    order: Tensor | None
    length: int
    counts: Tensor


def groups(chosen: Tensor, counts: Sequence[int]) -> list[Group]:
    """Split the rows that run into calls.

    Args:
        chosen: (B, T) bool, the tokens that run.
        counts: B numbers, the sum of each row of `chosen`, known to the host.
    """
    return [_group(chosen, rows, counts) for rows in partition(counts)]


def partition(counts: Sequence[int]) -> list[list[int]]:
    """Rows with a count above zero, in lists whose largest count exceeds their mean by at most `WASTE`."""
    parts: list[list[int]] = []
    for row in sorted((r for r, n in enumerate(counts) if n), key=lambda r: (-counts[r], r)):
        if parts:
            total = sum(counts[r] for r in parts[-1]) + counts[row]
            if counts[parts[-1][0]] * (len(parts[-1]) + 1) <= (1 + WASTE) * total:
                parts[-1].append(row)
                continue
        parts.append([row])
    return [sorted(part) for part in parts]


def _group(chosen: Tensor, rows: list[int], counts: Sequence[int]) -> Group:
    index = torch.tensor(rows, device=chosen.device)
    here = torch.tensor([counts[r] for r in rows], device=chosen.device)
    length = max(counts[r] for r in rows)
    if length == chosen.shape[1] and min(counts[r] for r in rows) == length:
        return Group(index, None, length, here)
    order = chosen[index].to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return Group(index, order, length, here)


def take(x: Tensor, rows: Tensor, positions: Tensor | None, batch: int) -> Tensor:
    """Rows and positions of a (B or 1, T, …) tensor: (G, n, …)."""
    if x.shape[0] == batch and batch > 1:
        x = x[rows]
    if positions is None:
        return x
    if x.shape[0] == 1 and positions.shape[0] > 1:
        x = x.expand(positions.shape[0], *x.shape[1:])
    index = positions.view(*positions.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
