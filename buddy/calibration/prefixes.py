"""Which beginnings of plans are worth keeping, so that the next call need not walk them again.

A greedy search asks in each round for plans that begin as plans of the round before. Where room is short, the states
after some layers are kept, evenly spaced, and a plan goes on from the nearest one.
"""

from __future__ import annotations

import os
from collections.abc import Collection

import torch

MOST = 2 << 30  # bytes
SHARE = 0.25  # of the memory


def worth_keeping(plans: Collection[str], layers: int, room: int) -> set[str]:
    """At most `room` beginnings of plans, at evenly spaced layers, as densely as they fit.

    Args:
        plans: L letters each.
        layers: L.
        room: how many states may be kept.
    """
    for count in range(layers - 1, 0, -1):
        ends = {round(layers * place / (count + 1)) for place in range(1, count + 1)}
        kept = {plan[:end] for plan in plans for end in ends}
        if len(kept) <= room:
            return kept
    return set()


def room_for(size: int, device: torch.device, batches: int) -> int:
    """How many states of `size` bytes may be kept for each batch."""
    return min(MOST, int(_memory(device) * SHARE)) // (size * batches)


def _memory(device: torch.device) -> int:
    """Bytes: what is free on an accelerator of its own, else all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return MOST
