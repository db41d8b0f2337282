"""A language model without its decoder layers: what comes before them, and what comes after."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Shell:
    """The embeddings, masks, position embeddings, last norm and head of a model, by the model's own code.

    A twin of the model shares everything but its layers; in their place it has stand-ins that note how each layer is
    called. So nothing here knows one family from another.

    Args:
        model: the whole model, routed or not; its weights are shared, none is copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = copy.deepcopy(model.config)
        with torch.device("meta"):
            twin = type(model)(config)
        self._layers = [_StandIn() for _ in model.model.layers]
        for name, part in model.model.named_children():
            setattr(twin.model, name, nn.ModuleList(self._layers) if name == "layers" else part)
        twin.lm_head = model.lm_head
        twin.config._attn_implementation = model.config._attn_implementation
        self._twin = twin.eval()

    def enter(self, input_ids: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """The hidden state (B, T, D) that enters the first layer, and each layer's keyword arguments.

        Args:
            input_ids: (B, T) long, without padding.
        """
        self._twin.model(input_ids, use_cache=False)
        inputs = [layer.inputs for layer in self._layers]
        hidden = self._layers[0].hidden
        self._forget()
        return hidden, inputs

    def leave(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) of hidden states (n, D) as they leave the last layer."""
        last = self._layers[-1]
        last.given = hidden[None]
        try:
            return self._twin(self._any_token(hidden.device), use_cache=False).logits[0]
        finally:
            self._forget()

    def _forget(self) -> None:
        for layer in self._layers:
            layer.hidden = layer.inputs = layer.given = None

    @staticmethod
    def _any_token(device: torch.device) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.long, device=device)


class _StandIn(nn.Module):
    """Stands where a decoder layer was: notes its call, and gives back what it got, or what it was given to say."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: Any = None
        self.inputs: Any = None
        self.given: Any = None

    def forward(self, hidden_states: Tensor, **inputs: Any) -> Tensor:
        self.hidden, self.inputs = hidden_states, inputs
        return hidden_states if self.given is None else self.given
