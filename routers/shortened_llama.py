"""Shortened LLaMA: keep the layers without which text is harder to predict, in one shot (Kim et al., 2402.02834)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from buddy import Context, Geometry, Probe, Router

CRITERIA = ("ppl", "taylor")
PROTECTED = {"ppl": (0, 0), "taylor": (4, 2)}  # default numbers of first and last layers


class ShortenedLlama(Router):
    """Static: a layer's score is its one-shot importance: rise of the perplexity without it, or Taylor+.

    Section 3.1 ("PPL"): the perplexity of the calibration text when one layer is left out. ("Taylor+"): Σ |w · ∂L/∂w|
    over a layer's weight matrices; the plus protects the first four and the last two layers. Protected layers are
    removed last, by their importance.

    Deviations from the paper: the context layers and the last always run, as for every router here; the sinks run every
    layer while a perplexity is measured; norms, whose share is tiny, are left out of the Taylor sum; the calibration
    text is the recipe's instead of ten samples of 128 tokens of BookCorpus; nothing is retrained afterwards.

    Args:
        geometry: sizes of the backbone.
        criterion: "ppl" or "taylor".
        protect: how many of the backbone's first and of its last layers are protected; null for the paper's, [0, 0]
            with "ppl" and [4, 2] with "taylor".

    Raises:
        ValueError: an unknown criterion, or not two numbers of at least 0.
    """

    source = "arXiv 2402.02834"

    def __init__(self, geometry: Geometry, *, criterion: str = "ppl", protect: Sequence[int] | None = None) -> None:
        super().__init__(geometry)
        if criterion not in CRITERIA:
            raise ValueError(f"criterion is {criterion!r}; choose one of {', '.join(CRITERIA)}")
        self.criterion = criterion
        self.protected = _protected(geometry, PROTECTED[criterion] if protect is None else protect)
        self.register_buffer("rank", torch.zeros(geometry.routable))

    def calibrate(self, probe: Probe) -> None:
        """Measure the criterion on the calibration windows and rank the layers by it."""
        importance = probe.loss_increase if self.criterion == "ppl" else probe.taylor
        order = sorted(range(len(importance)), key=lambda i: (self.protected[i], float(importance[i]), -i))
        self.rank[order] = torch.arange(len(order), dtype=self.rank.dtype, device=self.rank.device)

    def score(self, context: Context) -> Tensor:
        """(..., R): the rank by importance, protected layers above all others; the same for every token."""
        return self.rank.expand(*context.executed.shape, -1)


def _protected(geometry: Geometry, protect: Sequence[int]) -> list[bool]:
    numbers = isinstance(protect, Sequence) and all(type(count) is int and count >= 0 for count in protect)
    if not numbers or len(protect) != 2:
        raise ValueError(f"protect is {protect!r}; give two numbers of layers, the first and the last, such as [4, 2]")
    first, last = protect
    layers = range(geometry.context_layer, geometry.context_layer + geometry.routable)
    return [layer < first or layer >= geometry.layers - last for layer in layers]
