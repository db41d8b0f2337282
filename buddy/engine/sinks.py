"""What the attention sinks become in each layer, computed once for the tokens they are.

A sink runs every layer whatever the budget, alone where a layer's other tokens skip it; all of the layer's weights are
then read for one token. But the first positions see nothing before them, so their way through the model depends on
their token ids alone, and prompts begin alike: with the same token of beginning, the same chat template.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

KEPT = 64  # beginnings that are remembered
Beginning = tuple[int, ...]


@dataclass(frozen=True)
class SinkStates:
    """One beginning of s tokens, or a batch of B.

    Attributes:
        hidden: for each layer (B, s, D), the states that leave it.
        keys, values: for each layer (B, heads, s, size).
    """

    hidden: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    def row(self, index: int) -> SinkStates:
        """The states of one row, as a batch of one, apart from the others' memory."""
        return SinkStates(*([x[index : index + 1].clone() for x in each] for each in self._parts))

    @property
    def _parts(self) -> tuple[list[Tensor], ...]:
        return self.hidden, self.keys, self.values

    @staticmethod
    def batch(rows: list[SinkStates]) -> SinkStates:
        """Rows as one batch."""
        if len(rows) == 1:
            return rows[0]
        return SinkStates(
            *([torch.cat(x) for x in zip(*each, strict=True)] for each in zip(*(r._parts for r in rows), strict=True))
        )


class SinkMemory:
    """Remembers the states of beginnings; forgets them all when a weight of the model changes.

    Args:
        base: the decoder, called as the stock model.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = (base,)  # in a tuple, so that a copy of the owner does not copy the model twice
        self._held: OrderedDict[Beginning, SinkStates] = OrderedDict()
        self._weights: list[tuple[int, int]] = []

    def states(self, ids: Tensor) -> SinkStates:
        """Of beginnings ids (B, s) long; those not met before are computed by a stock forward of their own."""
        weights = [(p.data_ptr(), p._version) for p in self._base[0].parameters()]
        if weights != self._weights:
            self._held.clear()
            self._weights = weights
        wanted = [tuple(row) for row in ids.tolist()]
        missing = [each for each in dict.fromkeys(wanted) if each not in self._held]
        if missing:
            computed = self._computed(torch.tensor(missing, device=ids.device))
            for index, beginning in enumerate(missing):
                self._held[beginning] = computed.row(index)
        rows = [self._held[each] for each in wanted]
        for each in dict.fromkeys(wanted):
            self._held.move_to_end(each)
        while len(self._held) > KEPT:
            self._held.popitem(last=False)
        return SinkStates.batch(rows)

    @torch.no_grad()
    def _computed(self, ids: Tensor) -> SinkStates:
        base = self._base[0]
        cache = DynamicCache(config=base.config)
        with _outputs(base.layers) as hidden:
            base(input_ids=ids, cache=cache, use_cache=True)
        return SinkStates(hidden, [x.keys for x in cache.layers], [x.values for x in cache.layers])


@contextmanager
def _outputs(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """What each layer gives within this block."""
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: found.append(out)) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
