"""Bridges: a small linear map of the hidden state for tokens that skip a layer, in place of nothing.

A token that skips layer l has the state h + up_l · down_l · LN(h) + bias_l after it, where LN is layer norm without
weights. A bridge acts only where a token skips, so it corrects what the plan leaves out, and full depth is the stock
model. Its keys and values in that layer come from h, the state before the bridge, which is fitted to be near the dense
model's input of the layer. Related: ReplaceMe (2505.02819) maps over one block of layers that is the same for all
tokens; FlexiDepth (2503.23798) trains an adapter in the skip path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.errors import DamagedError
from buddy.io import load_tensors, save_tensors
from buddy.router import Geometry


def bridge_input(hidden: Tensor) -> Tensor:
    """What a bridge multiplies, of hidden states (…, D): layer norm without weights."""
    return F.layer_norm(hidden, hidden.shape[-1:])


def bridged(hidden: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """The state (…, D) after skipping a layer, from the state before it; weights (r, D), (D, r) and (D,)."""
    return hidden + F.linear(F.linear(bridge_input(hidden), down), up, bias)


class Bridges(nn.Module):
    """One bridge for each routable layer, for all budgets; new ones change nothing.

    Args:
        geometry: of the model.
        rank: r, from 1 to D.

    Attributes:
        rank: r.
        down: (L, r, D).
        up: (L, D, r).
        bias: (L, D).
        fitted: (L,) bool; a layer without a bridge passes the state on as it is.
    """

    def __init__(self, geometry: Geometry, rank: int) -> None:
        super().__init__()
        layers, width = geometry.layers, geometry.hidden
        self.rank = rank
        self.down = nn.Parameter(torch.zeros(layers, rank, width), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(layers, width, rank), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(layers, width), requires_grad=False)
        self.register_buffer("fitted", torch.zeros(layers, dtype=torch.bool))
        # The weights of each layer, for many tokens and for a decode step; None while they are trained.
        self._frozen: list[tuple[Tensor, ...] | None] | None = None
        self._single: list[tuple[Tensor, ...] | None] = []
        self._dtype = torch.float32

    @property
    def size(self) -> int:
        """Number of weights of the layers that have a bridge."""
        return int(self.fitted.sum()) * sum(part[0].numel() for part in (self.down, self.up, self.bias))

    def forward(self, layer: int, hidden: Tensor) -> Tensor:
        """The state (…, D) after skipping a layer, from the state before it."""
        if self._frozen is not None and hidden.dtype != self._dtype:  # the backbone was cast
            self.freeze(hidden.dtype)
        frozen = self._frozen
        if frozen is not None and hidden.dim() == 3 and hidden.shape[1] == 1:
            return self._step(layer, hidden)
        parts = self._parts(layer, hidden.dtype) if frozen is None else frozen[layer]
        return hidden if parts is None else bridged(hidden, *parts)

    def _step(self, layer: int, hidden: Tensor) -> Tensor:
        """`forward` for a decode step (B, 1, D), in few operations: each costs more than its arithmetic.

        In float32, since products of one vector in bfloat16 take twice as long.
        """
        parts = self._single[layer]
        if parts is None:
            return hidden
        down, one, up = parts
        # Views, not transposes: a product of a state with other strides copies the weights once a row.
        rows = hidden.float() if len(hidden) == 1 else hidden.float().view(1, *hidden.shape[::2])
        rows = torch.baddbmm(rows, torch.baddbmm(one, bridge_input(rows), down), up).to(hidden.dtype)
        return rows if len(hidden) == 1 else rows.view(hidden.shape)

    @torch.no_grad()
    def set(self, layer: int, down: Tensor, up: Tensor, bias: Tensor) -> None:
        """Give a layer its bridge: (r, D), (D, r) and (D,)."""
        for whole, part in zip((self.down, self.up, self.bias), (down, up, bias), strict=True):
            whole[layer] = part
        self.fitted[layer] = True
        self._frozen = None

    def trainable(self) -> Bridges:
        """Switch to training: weights in float32 with gradients."""
        self._frozen = None
        return self.requires_grad_(True)

    def freeze(self, dtype: torch.dtype) -> Bridges:
        """End training; from now on the bridges compute in `dtype`, the backbone's, or in float32 in a decode step."""
        self.requires_grad_(False)
        with torch.inference_mode(False):  # these outlive a block in which they are made anew
            self._frozen = [self._parts(layer, dtype) for layer in range(len(self.fitted))]
            self._single = [
                None if parts is None else _joined(*parts) for parts in map(self._parts, range(len(self.fitted)))
            ]
        self._dtype = dtype
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Bridges:
        """Called by torch to move the module; what is frozen moves with it."""
        super()._apply(*args, **kwargs)
        return self if self._frozen is None else self.freeze(self._dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Called by torch to load the module; what is frozen follows."""
        super()._load_from_state_dict(*args)
        if self._frozen is not None:
            self.freeze(self._dtype)

    def save(self, path: Path) -> None:
        """Write all weights to a safetensors file."""
        save_tensors(path, self.state_dict())

    @classmethod
    def load(cls, path: Path, geometry: Geometry, rank: int) -> Bridges:
        """The bridges in a file, not frozen yet.

        Raises:
            DamagedError: the file is missing, damaged, or of another rank or model.
        """
        try:
            bridges = cls(geometry, rank)
            bridges.load_state_dict(load_tensors(path))
        except RuntimeError as error:
            raise DamagedError(path, f"it does not hold bridges of rank {rank} for this model") from error
        return bridges

    def _parts(self, layer: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...] | None:
        if not self.fitted[layer]:
            return None
        return tuple(part[layer].to(dtype) for part in (self.down, self.up, self.bias))


def _joined(down: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(1, D, r + 1), (1, 1, r + 1) and (1, r + 1, D): with a constant 1 as another entry, one product adds the bias."""
    one = F.pad(down.new_zeros(1, 1, len(down)), (0, 1), value=1.0)
    return F.pad(down.T, (0, 1))[None].contiguous(), one, torch.cat([up.T, bias[None]])[None].contiguous()
