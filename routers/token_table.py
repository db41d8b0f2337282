"""A table of scores by token id: what is left of routing when a router knows nothing but the newest token."""

import torch
from torch import Tensor, nn

from buddy import Context, Geometry
from routers.buddy import PriorRouter
from routers.gates import check_least


class TokenTable(PriorRouter):
    """Learned: scores for each vocabulary id, beside scores that all ids share.

    s' = A · tanh((b + table[id]) / A) + ω · p̂, trained as `buddy` is and from the same prior. The table starts at
    zero, so an id that training did not see has the shared scores. It is the control for routers that see more: what
    they gain over it is what context is worth.

    Args:
        geometry: sizes of the backbone.
        rows: of the table; larger ids share rows.
        prior, prior_windows, prior_weight, bound: as for `BuddyRouter`.
    """

    source = "–"

    def __init__(
        self,
        geometry: Geometry,
        *,
        rows: int = 65536,
        prior: str = "greedy",
        prior_windows: int = 8,
        prior_weight: float = 0.3,
        bound: float | None = 2.0,
    ) -> None:
        check_least(1, rows=rows)
        super().__init__(geometry, prior, prior_windows, prior_weight, bound)
        self.shared = nn.Parameter(torch.zeros(geometry.routable))
        self.table = nn.Embedding(rows, geometry.routable)
        nn.init.zeros_(self.table.weight)

    def learned(self, context: Context) -> Tensor:
        """(..., R) float32: the shared scores, plus those of the newest token's id where it is known."""
        if context.tokens is None:
            return self.shared.expand(*context.executed.shape, -1)
        return self.shared + self.table(context.tokens % self.table.num_embeddings)

    def parameter_groups(self) -> list[dict]:
        """The shared scores at the rate of `buddy`'s bias; the table, whose rows are rarely seen, at ten times."""
        return [{"params": [self.shared], "scale": 3.0}, {"params": [self.table.weight], "scale": 10.0}]
