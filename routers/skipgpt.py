"""SkipGPT: token-aware gates, trained with Gumbel noise (Zhao et al., 2506.04179)."""

from __future__ import annotations

import torch
from torch import Tensor

from buddy import Geometry
from routers.gates import LinearGates, check_least


class SkipGPT(LinearGates):
    """Learned: a linear gate before each layer decides for each token, trained with Gumbel noise.

    A gate has two logits, to run and to skip. Training draws from their Gumbel-softmax, hard forward and soft backward,
    and adds λ · |mean gate − target|; the gates of all tokens and layers share the target. With two choices only the
    difference of the logits matters, and the difference of two Gumbel draws is a draw from the logistic distribution:
    the layer runs where w_i · h + b_i + noise > 0, with the gradient of σ((w_i · h + b_i + noise) / τ).

    Deviations from the paper and its authors' code:

    - Whole layers, where the paper has a gate for attention and another one for the MLP of each layer.
    - The count is exact for each token: the engine skips all layers once K have run, and runs all that are left where
      they are needed to reach K. In the paper tokens differ, and the mean alone is held to the target.
    - The paper trains one router for each sparsity. Here one serves all budgets: k / R shifts each gate by a learned
      amount, and the target of each row is (k − slack) / R. The paper has no slack; under an exact count a layer too
      few before the end costs little, and none left for the last layers costs much.
    - In serving a layer runs where its gate is open without noise; the authors' code draws there too.
    - τ is fixed, where the authors' code lowers it from 5 to 1 while training.
    - Gates see the normalised state. They are linear, of the size that the paper gives (0.01 % of the model's); those
      in the authors' code have a hidden layer.
    - The objective is the recipe's, and the paper's second stage, LoRA after the router, is the recipe's `adapter`.
    - Sinks, the context layers and the last layer always run.

    Args:
        geometry: sizes of the backbone.
        penalty_weight: λ, in nats; the authors' code has 20.
        temperature: τ.
        slack: layers by which the target is below k.
        start: the difference of a gate's logits before training, at full depth.

    Raises:
        ValueError: a negative penalty or slack, or a temperature that is not above 0.
    """

    source = "arXiv 2506.04179"

    def __init__(
        self,
        geometry: Geometry,
        *,
        penalty_weight: float = 20.0,
        temperature: float = 1.0,
        slack: float = 1.0,
        start: float = 3.0,
    ) -> None:
        super().__init__(geometry, start)
        check_least(0, penalty_weight=penalty_weight, slack=slack)
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; give a number above 0")
        self.penalty_weight, self.temperature, self.slack = penalty_weight, temperature, slack

    def weigh(self, logits: Tensor) -> Tensor:
        """(...) 0 or 1: in training a draw of the Gumbel-softmax, with its gradient."""
        noise = torch.rand_like(logits).logit(eps=1e-6) if self.training else 0.0
        return super().weigh((logits + noise) / self.temperature)

    def penalty(self, weights: Tensor, executed: Tensor) -> Tensor:
        """(B,): λ · |mean gate − target|."""
        target = self.share(executed - self.slack).clamp(min=0)
        return self.penalty_weight * (weights.mean((1, 2)) - target).abs()
