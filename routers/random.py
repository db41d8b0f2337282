"""A random order of layers, drawn once for the run or once for each input."""

import torch
from torch import Tensor

from buddy import Context, Geometry, Probe, Router
from routers.gates import check_least, normalised

PER = ("run", "input")


class RandomRouter(Router):
    """Random: the scores are a random order of the layers, drawn once for the run or once for each input.

    An input's order is a function of the seed and of the context of its prompt's last token, so the same input has the
    same plan each time: score_i = cos(w_i · x + φ_i) with w normal, φ uniform (random Fourier features, Rahimi & Recht
    2007) and x the pooled states and the hidden state, each normalised. Two texts differ enough to shift the phase by
    more than a cycle, so their orders are independent; rounding hardly shifts it, so an order does not depend on the
    batch in which an input comes.

    Args:
        geometry: sizes of the backbone.
        per: "run" draws one order for all inputs, "input" one for each, held while decoding.
        seed: of the order or orders; null for the recipe's.

    Raises:
        ValueError: an unknown value of `per`, or a negative seed.
    """

    kind = "random"

    def __init__(self, geometry: Geometry, *, per: str = "run", seed: int | None = None) -> None:
        super().__init__(geometry)
        if per not in PER:
            raise ValueError(f"per is {per!r}; choose one of {', '.join(PER)}")
        check_least(0, seed=seed)
        self.per, self.seed = per, seed
        if per == "input":
            self.scope = "prompt"
            self.register_buffer("frequency", torch.zeros(geometry.features + geometry.hidden, geometry.routable))
        self.register_buffer("order", torch.zeros(geometry.routable))
        self._draw(seed or 0)

    def calibrate(self, probe: Probe) -> None:
        """Draw with the recipe's seed where the options name none."""
        if self.seed is None:
            self._draw(probe.seed)

    def score(self, context: Context) -> Tensor:
        """(..., R): the same for every token, or for every token of an input; plans nest as the budget grows."""
        if self.per == "run":
            return self.order.expand(*context.executed.shape, -1)
        inputs = torch.cat([normalised(x) for x in (context.pooled, context.hidden)], -1)
        return torch.cos(inputs @ self.frequency + self.order)

    def _draw(self, seed: int) -> None:
        """An order (R,), or the phases (R,) and frequencies (F + D, R) that make one for each input."""
        generator, routable = torch.Generator().manual_seed(seed), self.geometry.routable
        if self.per == "run":
            self.order.copy_(torch.randperm(routable, generator=generator))
        else:
            self.order.copy_(2 * torch.pi * torch.rand(routable, generator=generator))
            self.frequency.copy_(torch.randn(self.frequency.shape, generator=generator))
