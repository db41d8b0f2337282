"""Does a router gain from the context? `buddy` with attention over the context layer's cached keys and values.

`buddy compare --recipe comparison --routers studies.attention:AttentionRouter routing.pool=both` with
`data.evaluate_on=validation`

The newest token asks, all tokens so far answer, through learned projections. A study and no plug-in: it attends among
the tokens of one forward, so it trains and is evaluated on whole windows, and cannot decode from a cache.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from buddy import Context, Geometry
from routers.buddy import BuddyRouter


class AttentionRouter(BuddyRouter):
    """Learned: what `buddy` scores from the values, plus a linear map of causal attention over the prefix.

    Args:
        geometry: sizes of the backbone, with keys and values as features (`routing.pool=both`).
        heads, size: of the attention.
        options: of `BuddyRouter`.
    """

    source = "–"

    def __init__(self, geometry: Geometry, *, heads: int = 4, size: int = 32, **options: Any) -> None:
        width = geometry.features // 2
        super().__init__(replace(geometry, features=width), **options)
        self.geometry, self.heads = geometry, heads
        self.query, self.key, self.value = (nn.Linear(width, heads * size) for _ in range(3))
        self.attended = nn.Linear(heads * size, geometry.routable)
        nn.init.zeros_(self.attended.weight)
        nn.init.zeros_(self.attended.bias)

    def learned(self, context: Context) -> Tensor:
        """(B, T, R) float32 for contexts (B, T) of whole windows."""
        keys, values = (F.layer_norm(part, part.shape[-1:]) for part in context.newest.chunk(2, -1))
        q, k, v = (
            layer(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, states in ((self.query, keys), (self.key, keys), (self.value, values))
        )
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        pooled, newest = (part.chunk(2, -1)[1] for part in (context.pooled, context.newest))
        return super().learned(replace(context, pooled=pooled, newest=newest)) + self.attended(found)

    def parameter_groups(self) -> list[dict]:
        """As `buddy`'s, the projections as its first layer and their output as its last."""
        projections = [p for layer in (self.query, self.key, self.value) for p in layer.parameters()]
        return [
            *super().parameter_groups(),
            {"params": projections, "scale": 0.25},
            {"params": list(self.attended.parameters()), "scale": 1.0},
        ]
