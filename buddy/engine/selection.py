"""The tokens that a layer runs on, as few rectangular calls.

A stock layer takes rectangles (rows × tokens), but each row of a batch may have its own number of tokens that chose the
layer. Rows with similar numbers share a call, padded with tokens that did not choose the layer and whose output is
dropped; rows with very different numbers get calls of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from buddy.engine.transfer import to_device

MIN_SKIPPED, MIN_SKIPPED_SHARE = 32, 1 / 8  # see `worth_selecting`
WASTE = 0.15  # the share of a call that may be padding
# Long calls have a multiple of so many tokens per row: oneDNN prepares a product for each new shape, which takes as
# long as the product itself, and remembers 1,024 shapes.
STEP, LONG = 16, 64


@dataclass(frozen=True)
class Group:
    """The rows and tokens of one call of a layer.

    Attributes:
        rows_on_host: the G rows of the batch.
        rows: (G,) long, the same on the device.
        order: (G, T) long, a permutation of each row's positions whose first `length` entries run: first those chosen,
            in rising order, then padding. None where every token runs.
        length: tokens per row in this call.
        counts: how many of the `length` were chosen, of each row.
    """

    rows_on_host: list[int]
    rows: Tensor
    order: Tensor | None
    length: int
    counts: list[int]

    @property
    def positions(self) -> Tensor | None:
        """(G, length) long, positions that run; None for all."""
        return None if self.order is None else self.order[:, : self.length]

    @property
    def rest(self) -> Tensor | None:
        """(G, n) long, which includes all positions that were not chosen; None where all run."""
        if self.order is None:
            return None
        fewest = min(self.counts)
        return self.order[:, fewest - fewest % STEP if self.order.shape[1] >= LONG else fewest :]

    @cached_property
    def real(self) -> Tensor | slice:
        """Selects the chosen tokens from the G · length of the call: (n,) long, or a slice where these come first."""
        if len(self.counts) == 1 or min(self.counts) == self.length:
            return slice(sum(self.counts))
        # On the host: a mask of the device would be waited for, to count what it selects.
        counts = torch.tensor(self.counts, device="cpu")
        chosen = torch.arange(self.length, device="cpu") < counts[:, None]
        return to_device(chosen.flatten().nonzero()[:, 0], self.rows.device)

    def flat(self, length: int, rows: Tensor) -> Tensor:
        """(n,) long, indices of the chosen tokens in a tensor of `rows` × `length` positions laid flat."""
        return (rows[:, None] * length + self.positions).flatten()[self.real]


def worth_selecting(counts: Sequence[int], tokens: int) -> bool:
    """Whether to select the tokens that run a layer; otherwise computing it for all, and choosing then, is faster.

    To select tokens and to write the keys and values of the others takes time, and attention for selected queries has
    no causal kernel, which leaves out half of the products. Both numbers were measured with one and two threads of a
    CPU (docs/speed.md).

    Args:
        counts: tokens of each row that run.
        tokens: of all rows.
    """
    return tokens - sum(counts) > MIN_SKIPPED + MIN_SKIPPED_SHARE * tokens


def groups(chosen: Tensor, counts: Sequence[int]) -> list[Group]:
    """Split the rows that run into calls.

    Args:
        chosen: (B, T) bool, the tokens that run.
        counts: B numbers, the sum of each row of `chosen`, on the host.
    """
    total, made = chosen.shape[1], []
    for rows in partition(counts):
        ours, index, order = [counts[row] for row in rows], to_device(rows, chosen.device), None
        length = max(ours)
        if min(ours) < total:
            order = chosen[index].to(torch.int8).argsort(dim=1, descending=True, stable=True)
            length = min(total, -(-length // STEP) * STEP) if total >= LONG else length
        made.append(Group(rows, index, order, length, ours))
    return made


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


def take(x: Tensor, rows: Tensor, positions: Tensor | None, batch: int) -> Tensor:
    """Rows and positions of a (B or 1, T, …) tensor: (G, n, …)."""
    same_for_all = (x.shape[0] == 1 and batch > 1) or batch == 1
    if positions is None:
        return x if same_for_all else x[rows]
    flat = positions if same_for_all else rows[:, None] * x.shape[1] + positions
    # One flat selection of whole rows: several times faster than `gather` with an expanded index.
    return x.reshape(-1, *x.shape[2:]).index_select(0, flat.flatten()).view(*positions.shape, *x.shape[2:])


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of a tensor, or of each tensor in a tuple; None as it is."""
    return tuple(map(function, value)) if isinstance(value, tuple) else None if value is None else function(value)
