"""`regress`: predicts the loss at each budget and takes the smallest budget close enough to full depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buddy.predictor.features import Predictor

STRENGTHS = 10.0 ** torch.arange(-3, 5, 0.5, dtype=torch.float64)  # in units of the mean squared norm of a row


class CurvePredictor(Predictor):
    """Predicts the increase of a request's loss per token at each budget over full depth.

    A ridge regression, since few prompts have losses measured at every budget. Its features are the pooled states, or
    all features if these predict left-out requests better. It chooses the smallest budget whose predicted increase is
    at most ε, or the largest allowed budget if there is none.

    Args:
        size: length of the feature vector.
        arms: executed layers K to choose from.
        pooled: length of the pooled states, the first features.
        epsilon: ε, nats per token.
    """

    name = "regress"

    def __init__(self, size: int, arms: Sequence[int], *, pooled: int, epsilon: float) -> None:
        super().__init__(arms)
        self.pooled, self.epsilon = pooled, float(epsilon)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("slope", torch.zeros(len(self.arms), size))
        self.register_buffer("level", torch.zeros(len(self.arms)))

    def fit(self, features: Tensor, increase: Tensor) -> Tensor:
        """Fit in place; returns leave-one-out predictions (N, arms) float64.

        Args:
            features: (N, size).
            increase: (N, arms), nats per token above full depth.
        """
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0, correction=0).clamp(min=1e-6))
        inputs, wanted = self._standardised(features).double().cpu(), increase.double().cpu()
        unit = wanted.var(0, correction=0).clamp(min=1e-12)
        fits = [ridge(inputs[:, :width], wanted) for width in dict.fromkeys((self.pooled, inputs.shape[1]))]
        slope, level, left_out = min(fits, key=lambda fit: ((fit[2] - wanted).square().mean(0) / unit).sum())
        self.slope.zero_()[:, : slope.shape[1]] = slope
        self.level.copy_(level)
        return left_out

    def increase(self, features: Tensor) -> Tensor:
        """(..., arms) float32: predicted nats per token above full depth, of features (..., size)."""
        return self._standardised(features) @ self.slope.T + self.level

    def choose(self, features: Tensor, allowed: Sequence[int]) -> Tensor:
        """See `Predictor.choose`."""
        arms = torch.tensor(self.arms, device=features.device)[allowed]
        return smallest_within(self.increase(features)[..., allowed], arms, self.epsilon)

    def _standardised(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


def smallest_within(increase: Tensor, arms: Tensor, epsilon: float) -> Tensor:
    """(...) long: the smallest arm whose increase is at most ε, or the largest arm if there is none.

    Args:
        increase: (..., A) nats.
        arms: (A,) long.
    """
    near = torch.where(increase <= epsilon, arms, arms.max() + 1).amin(-1)
    return near.clamp(max=int(arms.max()))


def ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression: slope (P, F), level (P,) and leave-one-out predictions (N, P).

    All targets share the strength with the smallest leave-one-out error, in units of each target's variance. An
    infinite strength, which predicts the mean, is among the candidates, so uninformative features have no effect.

    Args:
        features: (N, F) float64, of mean 0.
        targets: (N, P) float64.
    """
    count, level = len(features), targets.mean(0)
    centred = targets - level
    values, vectors = torch.linalg.eigh(features @ features.T)
    values, parts = values.clamp(min=0), vectors.T @ centred
    unit = centred.square().mean(0).clamp(min=torch.finfo(targets.dtype).tiny)
    left_out = _leave_one_out(centred, torch.full((count,), 1 / count, dtype=features.dtype))
    slope = torch.zeros(targets.shape[1], features.shape[1], dtype=features.dtype)
    for strength in STRENGTHS * features.square().sum() / count:
        shrunk = values / (values + strength)
        leverage = 1 / count + (vectors.square() * shrunk).sum(1)
        rest = _leave_one_out(centred - vectors @ (shrunk[:, None] * parts), leverage)
        if (rest.square().mean(0) / unit).sum() < (left_out.square().mean(0) / unit).sum():
            left_out, slope = rest, (features.T @ (vectors @ (parts / (values + strength)[:, None]))).T
    return slope, level, targets - left_out


def _leave_one_out(residuals: Tensor, leverage: Tensor) -> Tensor:
    """(N, P): the residual of each row under a regression without that row."""
    return residuals / (1 - leverage).clamp(min=1e-9)[:, None]
