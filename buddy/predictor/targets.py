"""What a predictor learns from: contexts of prompts, and what the continuations lose at each budget."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buddy.backbone.load import fingerprint
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError
from buddy.io import load_tensors, save_tensors
from buddy.losses import cross_entropy
from buddy.predictor.features import features_of

SAVE_EVERY = 5.0  # seconds: what a kill may cost, with the batch that it interrupts
Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Targets:
    """N requests, each a window whose first tokens are the prompt.

    Attributes:
        counts: executed layers K that were measured, deepest first; the first is full depth.
        features: (N, size) float32, of the prompts' contexts.
        losses: (N, counts) float64, mean cross-entropy of the continuation's tokens, nats.
    """

    counts: tuple[int, ...]
    features: Tensor
    losses: Tensor

    def at(self, arms: Sequence[int]) -> Tensor:
        """(N, arms) float64: losses under each arm."""
        return self.losses[:, [self.counts.index(arm) for arm in arms]]

    def increase(self, arms: Sequence[int]) -> Tensor:
        """(N, arms) float64: how much more is lost under each arm than at full depth."""
        return self.at(arms) - self.losses[:, :1]


@torch.no_grad()
def measure(
    routed: RoutedLM,
    batches: Sequence[Callable[[], Tensor]],
    arms: Sequence[int],
    *,
    prompt: int,
    place: Path | None = None,
    track: Track = iter,
) -> Targets:
    """Run windows under the router's own plans at each arm and at full depth.

    Args:
        routed: model and router, as they will serve.
        batches: each gives windows (B, W) long.
        arms: executed layers K.
        prompt: tokens of a window that the predictor sees; the others are scored.
        place: a file that keeps what was measured, so that the same call goes on where it was killed; None for none.
        track: wraps the batches to show progress.
    """
    counts = tuple(sorted({*arms, routed.geometry.layers}, reverse=True))
    features, losses, done = _kept(place)
    saved = time.monotonic()
    for number, batch in enumerate(track(batches)):
        if number < done:
            continue
        ids = batch().to(routed.backbone.device)
        features.append(features_of(routed.context(ids[:, :prompt])).cpu())
        losses.append(_losses(routed, ids, counts, prompt))
        if place and (time.monotonic() - saved >= SAVE_EVERY or number == len(batches) - 1):
            _keep(place, features, losses, number + 1)
            saved = time.monotonic()
    return Targets(counts, torch.cat(features), torch.cat(losses))


def digest_of(routed: RoutedLM, *others: object) -> str:
    """20 hexadecimal digits of the router's and the model's state, and of what else measured losses depend on."""
    model = fingerprint(routed.backbone.model)  # as it is now, with an adapter where it has one
    digest = hashlib.sha256(repr((model, routed.settings, routed.pool, routed.policy.name, others)).encode())
    for name, tensor in sorted(routed.router.state_dict().items()):
        flat = tensor.detach().cpu().flatten()  # a single number too has a dimension then
        digest.update(name.encode() + flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


def _losses(routed: RoutedLM, ids: Tensor, counts: Sequence[int], prompt: int) -> Tensor:
    """(B, counts) float64, mean cross-entropy of the tokens after the prompt."""
    scored = torch.arange(prompt - 1, ids.shape[1] - 1, device=ids.device)
    found = []
    for count in counts:
        logits = routed(ids, executed=torch.full((len(ids),), count), prompt=prompt, logits_to_keep=scored).logits
        found.append(cross_entropy(logits, ids[:, scored + 1]).double().mean(1))
    return torch.stack(found, 1).cpu()


def _keep(place: Path, features: Sequence[Tensor], losses: Sequence[Tensor], done: int) -> None:
    tensors = {"features": torch.cat(list(features)), "losses": torch.cat(list(losses)), "done": torch.tensor(done)}
    save_tensors(place, tensors, {"format": "pt"})


def _kept(place: Path | None) -> tuple[list[Tensor], list[Tensor], int]:
    if place is None or not place.exists():
        return [], [], 0
    try:
        found = load_tensors(place)
        return [found["features"]], [found["losses"]], int(found["done"])
    except (BuddyError, KeyError):  # cut: measured anew
        return [], [], 0
