"""MindSkip: gates with a capacity for each layer; only the gates are trained (He et al., 2410.13184)."""

from __future__ import annotations

from torch import Tensor

from buddy import Geometry
from routers.gates import LinearGates, check_least


class MindSkip(LinearGates):
    """Learned: a linear gate for each layer decides for each token, and each layer has a capacity of tokens.

    Router-Tuning trains the gates alone, hard forward and with the gradient of their probability backward, and adds
    λ · max(0, share of tokens that run it − capacity) for each layer.

    Deviations from the paper and its authors' code:

    - Whole layers, where the paper skips attention alone. The authors' code can route whole blocks too.
    - A decision for each token (the code's granularity `block_token`), where the paper's main results have one for a
      sequence, from the mean of its states, which later tokens are part of.
    - The count is exact for each token: the engine skips all layers once K have run, and runs all that are left where
      they are needed to reach K. In the paper tokens differ, and only the capacity bounds the mean.
    - All routable layers have gates and one capacity, (k − slack) / R; the paper has gates in half of the layers. The
      paper has no slack; under an exact count a layer too few before the end costs little, and none left for the last
      layers costs much.
    - The paper trains one router for each capacity. Here one serves all budgets: k / R shifts each gate by a learned
      amount.
    - Gates see the state normalised without the layer's own weights, and the objective is the recipe's.
    - Sinks, the context layers and the last layer always run.

    Args:
        geometry: sizes of the backbone.
        penalty_weight: λ, in nats.
        slack: layers by which R · capacity is below k.
        start: a gate's logit before training, at full depth.

    Raises:
        ValueError: a negative penalty or slack.
    """

    source = "arXiv 2410.13184"

    def __init__(
        self, geometry: Geometry, *, penalty_weight: float = 0.2, slack: float = 1.0, start: float = 3.0
    ) -> None:
        super().__init__(geometry, start)
        check_least(0, penalty_weight=penalty_weight, slack=slack)
        self.penalty_weight, self.slack = penalty_weight, slack

    def penalty(self, weights: Tensor, executed: Tensor) -> Tensor:
        """(B,): λ · the sum over the layers of what the share of tokens has above the capacity."""
        capacity = self.share(executed - self.slack)[:, None]
        return self.penalty_weight * (weights.mean(1) - capacity).clamp(min=0).sum(1)
