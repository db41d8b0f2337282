"""KL to the dense model and next-token cross-entropy per token, the objective, and draws of budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class DenseDistribution:
    """The dense model's next-token distribution, as `kl_to_dense` needs it.

    Args:
        logits: (B, T, V).
    """

    def __init__(self, logits: Tensor) -> None:
        self.probability = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        self.negative_entropy = _by_token(_distribution, logits, self.probability)

    def __getitem__(self, rows: Tensor) -> DenseDistribution:
        if len(rows) == len(self.probability):
            return self
        part = object.__new__(DenseDistribution)
        # Not `probability[rows]`, which copies number by number: a fifth of a training step on a large vocabulary.
        part.probability = self.probability.index_select(0, rows)
        part.negative_entropy = self.negative_entropy.index_select(0, rows)
        return part


def kl_to_dense(dense: DenseDistribution, logits: Tensor) -> Tensor:
    """KL(dense ‖ routed) per token in nats, (B, T), of routed logits (B, T, V)."""
    return dense.negative_entropy + _by_token(_cross, dense.probability, logits)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Next-token cross-entropy per token in nats, (B, T), of logits (B, T, V) and targets (B, T) long."""
    chosen = logits.gather(-1, targets[..., None])[..., 0].float()
    return _by_token(lambda part: part.float().logsumexp(-1), logits) - chosen


def kl_and_cross_entropy(dense: DenseDistribution, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`kl_to_dense` and `cross_entropy` in one pass over the logits, which takes two thirds of the time of two."""
    chosen = logits.gather(-1, targets[..., None])[..., 0].float()
    normaliser, product = _by_token(_normaliser_and_product, dense.probability, logits).unbind(-1)
    return dense.negative_entropy + (normaliser - product), normaliser - chosen


def _distribution(logits: Tensor, probability: Tensor) -> Tensor:
    """Writes the probabilities; returns Σ p ln p, from the logits, which is cheaper than from the logarithms of p."""
    torch.softmax(logits.detach().float(), -1, out=probability)
    return -_cross(probability, logits)


def _cross(probability: Tensor, logits: Tensor) -> Tensor:
    normaliser, product = _normaliser_and_product(probability, logits).unbind(-1)
    return normaliser - product


def _normaliser_and_product(probability: Tensor, logits: Tensor) -> Tensor:
    """(N, 2): log Σ exp of the logits, and the logits' mean under the probabilities."""
    logits = logits.float()
    return torch.stack([logits.logsumexp(-1), (probability * logits).sum(-1)], -1)


def _by_token(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` over the last dimension, a few tokens at a time.

    Logits in float32 take some hundred kilobytes per token. On a CPU, a few tokens fit in its cache, which is several
    times faster than one pass over all tokens; on an accelerator the limit only saves memory.
    """
    *shape, vocabulary = tensors[0].shape
    step = max(1, 2**17 // vocabulary) if tensors[0].device.type == "cpu" else 512
    parts = zip(*(x.flatten(0, -2).split(step) for x in tensors), strict=True)
    return torch.cat([function(*part) for part in parts]).unflatten(0, shape)


class Objective:
    """Weighted sum of KL and cross-entropy, per token.

    Args:
        kl: weight of KL to the dense model.
        ce: weight of cross-entropy.
    """

    def __init__(self, kl: float = 1.0, ce: float = 0.0) -> None:
        self.kl, self.ce = kl, ce

    def __call__(self, dense: DenseDistribution, logits: Tensor, targets: Tensor) -> Tensor:
        """(B, T) nats."""
        loss: Any = self.kl * kl_to_dense(dense, logits) if self.kl else 0.0
        return loss + self.ce * cross_entropy(logits, targets) if self.ce else loss


def draw_budgets(grid: Sequence[int], rows: int, generator: torch.Generator) -> Tensor:
    """K for each of `rows` examples, (rows,) long, drawn from the grid without repeats as long as possible."""
    drawn: list[int] = []
    while len(drawn) < rows:
        drawn += [grid[i] for i in torch.randperm(len(grid), generator=generator)]
    return torch.tensor(drawn[:rows])
