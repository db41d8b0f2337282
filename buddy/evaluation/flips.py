"""Flips: answers that change from right to wrong or from wrong to right (2407.09141)."""

from collections.abc import Sequence


def flipped(full: Sequence[int], pruned: Sequence[int]) -> list[int]:
    """1 for each item that one of both answers rightly and the other wrongly, else 0.

    Args:
        full: 0 or 1 for each item, at full depth.
        pruned: the same items with layers left out.

    Raises:
        ValueError: not as many items.
    """
    return [int(one != other) for one, other in zip(full, pruned, strict=True)]
