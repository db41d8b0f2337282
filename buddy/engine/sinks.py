"""The attention sink's states in each layer, kept for the next prompt that begins with the same token.

The sink runs every layer whatever the budget; where all other tokens of a prompt skip a layer, its weights would be
read for one token. The first position sees nothing before it, so its states depend on its token id alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from buddy.backbone.adapter import adapter_state
from buddy.engine.kv_cache import WrittenKV
from buddy.engine.selection import map_tensors

MAX_TOKENS = 64  # token ids whose states are kept


class SinkStates:
    """What one token becomes at the first position. The first prompt that begins with it fills this layer by layer.

    Attributes:
        layers: for each layer that ran the state that leaves it, (1, 1, D), its keys and its values, (1, kv heads, 1,
            size); one entry for the three, so that an interrupt leaves no layer with some of them.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor, Tensor]] = []

    def run(self, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Run the next layer on the token by itself, so that no result depends on which prompt came first."""
        written, names = WrittenKV(None), ("position_embeddings", "position_ids")
        first = {name: map_tensors(kwargs.get(name), lambda x: x[:1, :1]) for name in names}
        first |= {"cache": written, "attention_mask": None}
        state = self.layers[-1][0] if self.layers else hidden[:1, :1].clone()
        state = layer.stock.forward(layer, state, **{**kwargs, **first})
        self.layers.append((state, written.keys, written.values))


class SinkMemory:
    """`SinkStates` by token id; forgets them all when the model is seen to have changed.

    A weight that is written to through its `.data` is not seen; write to the weight itself, under `torch.no_grad()`.
    """

    def __init__(self) -> None:
        self._states: dict[int, SinkStates] = {}
        self._model: list[Any] | None = None

    @torch.no_grad()
    def states(self, base: nn.Module, ids: Tensor, positions: Tensor | None) -> SinkStates | None:
        """Those of the token that all prompts (B, T) begin with; None where they depend on more than the token.

        That is at another position than the first, with a hook on a module, and under autocast.
        """
        first = set(ids[:, 0].tolist())
        elsewhere = positions is not None and bool(positions[..., 0].any())
        if len(first) > 1 or elsewhere or torch.is_autocast_enabled(ids.device.type):
            return None
        model = _fingerprint(base)
        if model != self._model:
            self._states, self._model = {}, model
        if model is None:
            return None
        token = first.pop()
        if token not in self._states and len(self._states) == MAX_TOKENS:
            del self._states[next(iter(self._states))]
        return self._states.setdefault(token, SinkStates())


def _fingerprint(base: nn.Module) -> list[Any] | None:
    """What changes when a weight is replaced or written to or an adapter is switched; None where a module has hooks.

    Every prompt asks for it, of hundreds of modules, so it does not use torch's own walk, which takes twice as long.
    """
    found: list[Any] = []
    modules = [base.embed_tokens, base.layers]
    while modules:
        module = modules.pop()
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            return None
        found.append(adapter_state(module))
        for weight in own["_parameters"].values():
            if weight is not None:
                found += (weight.data_ptr(), -1 if weight.is_inference() else weight._version)
        modules += [module for module in own["_modules"].values() if module is not None]
    return found
