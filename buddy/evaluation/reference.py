"""What the evaluations of several routers on one text have in common: the dense model, and full depth."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from buddy.backbone.load import Backbone

if TYPE_CHECKING:
    from buddy.scoring.perplexity import Scores

MOST = 2**30  # bytes


class Reference:
    """Keeps the dense model's last hidden states of a text, and the scores of full depth, which all routers share.

    Hidden states are kept rather than logits, which take a hundred times their memory and cost a fifth of a small
    model's pass. At full depth every router has the same plan, whatever its scores, so it runs once.

    One object is for one backbone, one set of windows, and one way of cutting them into batches and scoring them.

    Args:
        most: bytes of hidden states that are kept; those beyond are computed again for each router.

    Attributes:
        full: scores at full depth, once a router was evaluated there.
    """

    def __init__(self, most: int = MOST) -> None:
        self.full: Scores | None = None
        self._states: dict[int, Tensor] = {}
        self._room = most

    @torch.no_grad()
    def dense(self, backbone: Backbone, batch: int, ids: Tensor, keep: Tensor) -> Tensor:
        """Logits (B, T', V) of the stock model at some positions of a batch (B, T), which its number tells apart."""
        states = self._states.get(batch)
        if states is None:
            states = backbone.base(input_ids=ids, use_cache=False).last_hidden_state[:, keep]
            if states.nbytes <= self._room:
                self._room -= states.nbytes
                self._states[batch] = states.cpu()
        return _head(backbone, states.to(ids.device), ids)


class _Given(nn.Module):
    """Stands where the decoder is, and says what it was given to say."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, **_: object) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.states)


def _head(backbone: Backbone, states: Tensor, ids: Tensor) -> Tensor:
    """Logits by the model's own code, which in some families does more than one product."""
    twin = copy.copy(backbone.model)
    twin._modules = {**backbone.model._modules, "model": _Given(states)}
    return twin(input_ids=ids, use_cache=False).logits
