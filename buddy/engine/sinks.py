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
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

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
    """Remembers the states of beginnings; forgets them all when the model is seen to have changed.

    What is looked at are the weights' storage and version and which adapters are switched on. A weight written through
    `.data` shows no change: whoever does that calls `forget`.

    Args:
        base: the decoder, called as the stock model.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = (base,)  # in a tuple, so that a copy of the owner does not copy the model twice
        self._held: OrderedDict[Beginning, SinkStates] = OrderedDict()
        self._state: list[Any] = []

    def forget(self) -> None:
        """Let go of all that is remembered."""
        self._held.clear()

    def states(self, ids: Tensor, positions: Tensor | None = None) -> SinkStates | None:
        """Of beginnings ids (B, s) long; each not met before is computed by a stock forward of its own.

        None where a beginning's states depend on more than its tokens: at other `positions` (B or 1, T) than the first,
        under a hook or autocast, or where the rotary embedding of several tokens depends on how many follow.
        """
        base, length = self._base[0], ids.shape[1]
        if positions is not None and bool((positions[..., :length] != torch.arange(length).to(ids)).any()):
            return None
        if torch.is_autocast_enabled(ids.device.type) or (length > 1 and _rotates_by_length(base.config)):
            return None
        state = _state([base.embed_tokens, base.layers])
        if state is None:
            return None
        if state != self._state:
            self.forget()
            self._state = state
        return SinkStates.batch([self._row(beginning, ids.device) for beginning in map(tuple, ids.tolist())])

    def _row(self, beginning: Beginning, device: torch.device) -> SinkStates:
        if beginning not in self._held:
            self._held[beginning] = self._computed(torch.tensor([beginning], device=device))
        self._held.move_to_end(beginning)
        found = self._held[beginning]
        if len(self._held) > KEPT:
            self._held.popitem(last=False)
        return found

    @torch.no_grad()
    def _computed(self, ids: Tensor) -> SinkStates:
        base = self._base[0]
        cache = DynamicCache(config=base.config)
        with _outputs(base.layers) as hidden:
            base(input_ids=ids, cache=cache, use_cache=True)
        return SinkStates(hidden, [x.keys for x in cache.layers], [x.values for x in cache.layers])


def _state(modules: list[nn.Module]) -> list[Any] | None:
    """What changes when a module in these is written to, replaced, or its adapters (peft) are switched; None: a hook.

    Asked at each prompt of hundreds of modules, so it goes past torch's own walk, which takes twice as long.
    """
    found: list[Any] = []
    while modules:
        own = modules.pop().__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return None
        found += (own.get("_disable_adapters"), str(own.get("_active_adapter")))
        for weight in own["_parameters"].values():
            if weight is not None:
                found += (id(weight), weight.data_ptr(), -1 if weight.is_inference() else weight._version)
        modules += [module for module in own["_modules"].values() if module is not None]
    return found


def _rotates_by_length(config: PreTrainedConfig) -> bool:
    kinds = str(getattr(config, "rope_parameters", None))
    return "dynamic" in kinds or "longrope" in kinds


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
