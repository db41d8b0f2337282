"""What a layer's cache holds for the tokens that skipped it.

`Fill` computes their K/V from the hidden state that passed the layer, `Zero` leaves zeros as the paper does, `Hole`
leaves nothing. Each has the same duties: `idle`, where no token of the forward runs the layer, `writer`, where some do,
and `settle`, before all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from buddy.engine.forward import Pass
from buddy.engine.ragged import Ragged
from buddy.engine.rectangular import KV, Rectangular
from buddy.errors import BuddyError

BOUND = 64  # states that may wait in a layer: a prompt's is one, then one for each token


class Fill:
    """K/V of a skipped layer come from the hidden state that passed it, as late as can be."""

    name = "fill"

    def idle(self, layer: nn.Module, current: Pass, hidden: Tensor, cache: Any, embeddings: Any) -> None:
        """Nobody runs the layer for these tokens: the states wait until somebody does, or until too many wait.

        A prompt's states wait where that takes no more memory than their keys and values.
        """
        held = cache.layers[layer._index]
        owed = held.owed
        owed.append((hidden, embeddings))
        full = len(owed) >= BOUND or held.is_sliding  # a window forgets; nothing may be late
        if not full and current.shape[1] == 1:  # a step of decoding comes here for each layer it skips
            return
        chunk = len(owed) > 1 and hidden.shape[1] > 1  # only a prompt waits whole
        if full or chunk or not current.may_wait(layer._index):
            self.settle(layer, cache)

    def settle(self, layer: nn.Module, cache: Any) -> None:
        """Compute what is owed, in one product for all waiting positions."""
        held = cache.layers[layer._index]
        if not held.owed:
            return
        owed, held.owed = held.owed, []
        states, embeddings = zip(*owed, strict=True)
        hidden = torch.cat(states, 1) if len(states) > 1 else states[0]
        written = layer._write_kv(layer, hidden, _joined(embeddings, hidden.shape[0]))
        held.update(*written)

    def writer(self, layer: nn.Module, current: Pass, hidden: Tensor, kwargs: dict) -> Rectangular:
        """Some run the layer."""
        if kwargs.get("cache") is not None:
            self.settle(layer, kwargs["cache"])
        return Rectangular(layer, current, hidden, kwargs, layer._write_kv)


class Zero:
    """Zeros in the cache, unmasked, so that they take their share of the softmax: the paper's way (2606.09514)."""

    name = "zero"

    def idle(self, layer: nn.Module, current: Pass, hidden: Tensor, cache: Any, embeddings: Any) -> None:
        """Nobody runs the layer for these tokens."""
        cache.update(*self._zeros(layer, hidden, embeddings), layer._index)

    def settle(self, layer: nn.Module, cache: Any) -> None:
        """Nothing waits."""

    def writer(self, layer: nn.Module, current: Pass, hidden: Tensor, kwargs: dict) -> Rectangular:
        """Some run the layer."""
        return Rectangular(layer, current, hidden, kwargs, self._zeros)

    @staticmethod
    def _zeros(layer: nn.Module, hidden: Tensor, _: Any) -> KV:
        heads, size = layer._kv_shape
        zeros = hidden.new_zeros(hidden.shape[0], heads, hidden.shape[1], size)
        return zeros, zeros


class Hole:
    """A token is absent from the cache of a layer that it skipped, and masked where other rows ran."""

    name = "hole"

    def idle(self, layer: nn.Module, current: Pass, hidden: Tensor, cache: Any, embeddings: Any) -> None:
        """Nobody runs the layer for these tokens: the positions go by."""
        cache.layers[layer._index].pass_by(hidden.shape[1])

    def settle(self, layer: nn.Module, cache: Any) -> None:
        """Nothing waits."""

    def writer(self, layer: nn.Module, current: Pass, hidden: Tensor, kwargs: dict) -> Ragged:
        """Some run the layer."""
        return Ragged(layer, current, hidden, kwargs)


Policy = Fill | Hole | Zero
POLICIES: dict[str, Policy] = {policy.name: policy for policy in (Fill(), Hole(), Zero())}


def policy_named(name: str) -> Policy:
    """The policy of that name; BuddyError names the accepted ones."""
    if name not in POLICIES:
        raise BuddyError(f"There is no cache policy {name!r}; choose one of {', '.join(POLICIES)}.")
    return POLICIES[name]


def _joined(embeddings: Sequence[Any], batch: int) -> Any:
    """Position embeddings of consecutive steps as one; where some hold for all rows, for the rows of the others."""
    if len(embeddings) == 1 or not isinstance(embeddings[0], tuple):
        return embeddings[0]
    rows = 1 if batch == 1 else max(part.shape[0] for part, *_ in embeddings)
    joined = []
    for parts in zip(*embeddings, strict=True):
        joined.append(torch.cat([part.expand(rows, -1, -1) for part in parts] if rows > 1 else parts, 1))
    return tuple(joined)
