"""Linear regression whose ridge is chosen by leaving each row out in turn."""

from __future__ import annotations

import torch
from torch import Tensor

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
