"""FiRST: a gate before every layer decides whether it runs (Jain et al., 2410.12513)."""

from __future__ import annotations

from torch import Tensor

from buddy import Geometry
from routers.gates import LinearGates, check_least

SCOPES = ("prompt", "token")
GATES = ("hard", "soft")


class FiRST(LinearGates):
    """Learned: one linear gate for each layer sees the state arriving there; the prompt's decisions hold for the input.

    A gate is open, and its layer runs, where σ(w_i · h + b_i) is above a half. One decision serves an input: gates are
    asked in prefill and hold while decoding, so no keys and values are missing. Training multiplies what a layer adds
    to the hidden state by its gate and adds a penalty on layers that are not skipped.

    Deviations from the paper:

    - The count is exact: the engine skips all layers once K have run, and runs all that are left where they are needed
      to reach K. In the paper the gates alone determine how many layers run.
    - The paper trains one router for each skipping rate. Here one serves all budgets: k / R, the share of routable
      layers that run, shifts each gate by a learned amount (`budget_aware`).
    - The paper's gates are soft in training. Scaling every layer by two thirds costs a model little, so soft gates
      converge to that, all of them open, and the exact count then skips the last layers, which matter most. Here gates
      are hard, with the gradient of soft ones (`gates`).
    - The paper's penalty is the sum of the probabilities, its weight tuned by hand for each rate. Here it is
      λ · max(0, mean gate − (k − 1) / R): linear too, but zero below the budget, with one layer of slack, since to run
      a layer more at the end costs little, and to have none left costs much.
    - The prompt's last token decides for the prompt, as in every router with one plan for each input. `scope="token"`,
      a decision for each token, is not in the paper.
    - Gates see the normalised state; its scale differs a hundredfold between layers.
    - The gates alone are trained, to the recipe's objective; the paper tunes LoRA adapters afterwards.
    - Sinks, the context layers and the last layer always run.

    `gates="soft"` and `budget_aware=False` come nearest to the paper's router; what else is listed above still differs.

    Args:
        geometry: sizes of the backbone.
        scope: "prompt", or "token": each token has its own decisions, which cost a synchronisation at each layer.
        gates: in training, "hard" or "soft".
        budget_aware: whether K shifts the gates.
        penalty_weight: λ, in nats.
        start: b_i before training; 3 is a probability of 0.95, nearly the dense model.

    Raises:
        ValueError: an unknown scope or kind of gate, or a negative penalty.
    """

    source = "arXiv 2410.12513"

    def __init__(
        self,
        geometry: Geometry,
        *,
        scope: str = "prompt",
        gates: str = "hard",
        budget_aware: bool = True,
        penalty_weight: float = 30.0,
        start: float = 3.0,
    ) -> None:
        super().__init__(geometry, start, budget_aware)
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}; choose one of {', '.join(SCOPES)}")
        if gates not in GATES:
            raise ValueError(f"gates is {gates!r}; choose one of {', '.join(GATES)}")
        check_least(0, penalty_weight=penalty_weight)
        self.scope = scope  # type: ignore[assignment]  # one of SCOPES
        self.hard, self.penalty_weight = gates == "hard", float(penalty_weight)

    def weigh(self, logits: Tensor) -> Tensor:
        """(...): the probability that a gate is open; of hard gates 0 or 1, with its gradient."""
        return super().weigh(logits) if self.hard else logits.sigmoid()

    def penalty(self, weights: Tensor, executed: Tensor) -> Tensor:
        """(B,): λ · max(0, mean gate − (k − 1) / R)."""
        return self.penalty_weight * (weights.mean((1, 2)) - self.share(executed - 1)).clamp(min=0)
