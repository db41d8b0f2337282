"""`regress`: predict the loss curve over budgets, take the smallest budget near enough to full depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from buddy.predictor.features import Choose, allowed, features_of, ordered
from buddy.router import Context

STRENGTHS = 10.0 ** torch.arange(-3, 5, 0.5, dtype=torch.float64)  # in units of the mean squared length of a row


def ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope (P, F), level (P,) and what each row's targets are predicted to be without that row, (N, P).

    All targets share the ridge with the least leave-one-out error, each target's in units of its variance. An endless
    one, which predicts the mean for all, is among them, so that where features tell nothing nothing is claimed.

    Args:
        features: (N, F) float64, of mean 0.
        targets: (N, P) float64.
    """
    count, level = len(features), targets.mean(0)
    centred = targets - level
    values, vectors = torch.linalg.eigh(features @ features.T)
    values, parts = values.clamp(min=0), vectors.T @ centred
    unit = centred.square().mean(0).clamp(min=torch.finfo(targets.dtype).tiny)
    left_out = _left_out(centred, torch.full((count,), 1 / count, dtype=features.dtype))
    slope = torch.zeros(targets.shape[1], features.shape[1], dtype=features.dtype)
    for strength in STRENGTHS * features.square().sum() / count:
        shrunk = values / (values + strength)
        leverage = 1 / count + (vectors.square() * shrunk).sum(1)
        rest = _left_out(centred - vectors @ (shrunk[:, None] * parts), leverage)
        if (rest.square().mean(0) / unit).sum() < (left_out.square().mean(0) / unit).sum():
            left_out, slope = rest, (features.T @ (vectors @ (parts / (values + strength)[:, None]))).T
    return slope, level, targets - left_out


def _left_out(rest: Tensor, leverage: Tensor) -> Tensor:
    """(N, P): what would be left of each row, had the regression not seen it."""
    return rest / (1 - leverage).clamp(min=1e-9)[:, None]


class CurvePredictor(nn.Module):
    """Predicts, for each budget, how much more a request loses a token than at full depth.

    A linear regression by least squares, since prompts whose losses were measured at every budget are few. It sees the
    pooled states alone, or all features where they predict requests that were left out better. It chooses the smallest
    budget whose predicted increase is at most ε; where none is, the largest that it may choose.

    Args:
        size: length of the feature vector.
        pooled: features at its start that are the pooled states.
        arms: executed layers K to choose from.
        epsilon: ε, nats a token.
    """

    name = "regress"

    def __init__(self, size: int, arms: Sequence[int], *, pooled: int, epsilon: float) -> None:
        super().__init__()
        self.arms, self.pooled, self.epsilon = ordered(arms), pooled, float(epsilon)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("slope", torch.zeros(len(self.arms), size))
        self.register_buffer("level", torch.zeros(len(self.arms)))

    def fit(self, features: Tensor, increase: Tensor) -> Tensor:
        """Regress; what the increases (N, arms) float64 of each row are predicted to be without that row.

        Args:
            features: (N, size).
            increase: (N, arms), nats a token above full depth, of each request at each arm.
        """
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0, correction=0).clamp(min=1e-6))
        seen, wanted = self._standardised(features).double().cpu(), increase.double().cpu()
        unit = wanted.var(0, correction=0).clamp(min=1e-12)
        fits = [ridge(seen[:, :width], wanted) for width in dict.fromkeys((self.pooled, seen.shape[1]))]
        slope, level, left_out = min(fits, key=lambda fit: ((fit[2] - wanted).square().mean(0) / unit).sum())
        self.slope.zero_()[:, : slope.shape[1]] = slope
        self.level.copy_(level)
        return left_out

    def increase(self, context: Context) -> Tensor:
        """(..., arms) float32: nats a token above full depth, as predicted for prompts' contexts (...)."""
        return self.increase_of(features_of(context))

    def increase_of(self, features: Tensor) -> Tensor:
        """The same from features (..., size)."""
        return self._standardised(features) @ self.slope.T + self.level

    def under(self, most: int) -> Choose:
        """What chooses K (...) for contexts (...), at most `most` layers; BudgetError where every arm has more."""
        places = allowed(self.arms, most)
        arms = torch.tensor(self.arms)[places]
        return lambda context: within(self.increase(context)[..., places], arms.to(context.pooled.device), self.epsilon)

    def _standardised(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


def within(increase: Tensor, arms: Tensor, epsilon: float) -> Tensor:
    """(...) long: the smallest arm whose increase is at most ε; the largest where none is.

    Args:
        increase: (..., A) nats.
        arms: (A,) long.
    """
    near = torch.where(increase <= epsilon, arms, arms.max() + 1).amin(-1)
    return near.clamp(max=int(arms.max()))
