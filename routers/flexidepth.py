"""FlexiDepth: a small network before each layer decides for each token (Luo et al., 2503.23798)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from buddy import Geometry
from routers.gates import GateRouter, check_least, normalised


class FlexiDepth(GateRouter):
    """Learned: a bottleneck network before each layer decides for each token; skipped layers may have bridges.

    A gate is open where σ(v_i · N(tanh(U_i · N(h)))) is above a half, N layer norm. A token that skips a layer still
    writes its keys and values there and passes through an adapter: here the recipe's bridge, under the policy `fill`.
    Training adds the square of the number of open gates of each token, so that tokens that run many layers are pushed
    the most.

    Deviations from the paper and its authors' code:

    - The adapter is a linear map of low rank, fitted in closed form for all routers alike (`bridge` in the recipe;
      without it there is none). The paper trains an MLP of a sixteenth of the width together with the gates.
    - The count is exact for each token: the engine skips all layers once K have run, and runs all that are left where
      they are needed to reach K. In the paper the gates alone determine how many layers run.
    - The paper's penalty is α · (sum of the gates)², so α sets how many layers run, and each α is a training of its
      own. Here one router serves all budgets: k / R shifts each gate by a learned amount, and the penalty is
      α · max(0, sum of the gates − (k − slack))². Under an exact count a layer too few before the end costs little,
      and none left for the last layers costs much.
    - Gates are hard, with the gradient of soft ones. In the paper what an open gate lets through is multiplied by its
      probability, in serving too, and the adapter's output by the rest.
    - All routable layers have gates; in the paper the latter half of the layers.
    - The paper's network goes back up to the width of the model before its last product. Nothing is between these two
      products, so here they are one.
    - The gates alone are trained, to the recipe's objective.
    - Sinks, the context layers and the last layer always run.

    Args:
        geometry: sizes of the backbone.
        bottleneck: width of the networks; null for a sixteenth of the model's, as in the paper.
        penalty_weight: α, in nats.
        slack: layers by which the number of open gates should be below k.
        start: a gate's logit before training, at full depth.

    Raises:
        ValueError: a width below 2, or a negative penalty or slack.
    """

    source = "arXiv 2503.23798"

    def __init__(
        self,
        geometry: Geometry,
        *,
        bottleneck: int | None = None,
        penalty_weight: float = 0.03,
        slack: float = 1.0,
        start: float = 3.0,
    ) -> None:
        super().__init__(geometry, start)
        check_least(0, penalty_weight=penalty_weight, slack=slack)
        if bottleneck is not None and bottleneck < 2:  # the norm of a single number is always 0
            raise ValueError(f"bottleneck is {bottleneck}; give 2 or more, or null for a sixteenth of the width")
        width = bottleneck or max(geometry.hidden // 16, 2)
        self.penalty_weight, self.slack = penalty_weight, slack
        self.down = nn.Parameter(torch.randn(geometry.routable, width, geometry.hidden) / math.sqrt(geometry.hidden))
        self.out = nn.Parameter(torch.zeros(geometry.routable, width))

    def logits(self, index: int, hidden: Tensor) -> Tensor:
        """(...): v_i · N(tanh(U_i · N(h)))."""
        narrow = torch.tanh(normalised(hidden) @ self.down[index].T)
        return normalised(narrow) @ self.out[index]

    def penalty(self, weights: Tensor, executed: Tensor) -> Tensor:
        """(B,): α · the mean over tokens of max(0, open gates − (k − slack))²."""
        most = (self.share(executed) * self.geometry.routable - self.slack).clamp(min=0)
        return self.penalty_weight * (weights.sum(-1) - most[:, None]).clamp(min=0).square().mean(1)
