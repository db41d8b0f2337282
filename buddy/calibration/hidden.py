"""How much the layers of the dense model change the hidden state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import pi

import torch
from torch import Tensor
from torch.nn import functional as F

from buddy.backbone import Backbone


@torch.no_grad()
def similarities(backbone: Backbone, batches: Iterable[Tensor], first: int, sinks: int) -> tuple[Tensor, Tensor]:
    """Block Influence (R,) and angular distances (R + 1, R + 1), both float32, in one pass over the windows.

    Args:
        backbone: no pass is under way in its layers.
        batches: windows (B, T) long.
        first: the first routable layer.
        sinks: first positions that Block Influence leaves out.
    """
    routable = backbone.num_layers - first - 1
    changes, angles = torch.zeros(routable), torch.zeros(routable + 1, routable + 1, dtype=torch.float64)
    tokens = windows = 0
    for batch in batches:
        batch = batch.to(backbone.device)
        with _entering(backbone, range(first, first + routable + 1)) as states:
            backbone.base(batch, use_cache=False)
        for index in range(routable):
            before, after = (state[:, sinks:].float() for state in states[index : index + 2])
            changes[index] += F.cosine_similarity(before, after, dim=-1).sum().cpu()
        angles += _angles(torch.stack([state[:, -1] for state in states], 1).cpu().double()).sum(0)
        tokens, windows = tokens + batch[:, sinks:].numel(), windows + len(batch)
    return 1 - changes / tokens, (angles / windows).triu(1).float()


def _angles(states: Tensor) -> Tensor:
    """(B, S, S), arccos(cos) / π between every two of states (B, S, D)."""
    unit = F.normalize(states, dim=-1)
    return (unit @ unit.mT).clamp(-1, 1).arccos() / pi


@contextmanager
def _entering(backbone: Backbone, layers: Iterable[int]) -> Iterator[list[Tensor]]:
    """The hidden states (B, T, D) that enter some layers, rising, during one forward within this block."""
    states: list[Tensor] = []
    hooks = [backbone.layers[i].register_forward_pre_hook(lambda _, args: states.append(args[0])) for i in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
