"""The mathematics of routing, recomputed by brute force: no cache, every layer on every token, chosen afterwards."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from buddy import Context, Geometry, Router


@torch.no_grad()
def reference_logits(model: PreTrainedModel, input_ids: Tensor, runs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits (B, T, V) of a stock model under plan `runs` (B, T, L): h ← h + m · (F(h) − h), K/V written by all."""

    def choose(index: int):
        def hook(_, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            return torch.where(runs[..., index, None], output, hidden)

        return hook

    hooks = [layer.register_forward_hook(choose(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)]
    try:
        positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
        return model(input_ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


class Fickle(Router):
    """Scores that change at every token, for tests: fixed random weights on all that the context holds."""

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry)
        width = 2 * geometry.features + geometry.hidden
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(width, geometry.routable, generator=generator))

    def score(self, context: Context) -> Tensor:
        seen = [
            torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in (context.pooled, context.newest, context.hidden)
        ]
        return torch.cat(seen, -1) @ self.weight
