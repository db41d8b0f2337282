"""The base of budget predictors, their features of a prompt, and the measured losses they are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.backbone.load import fingerprint
from buddy.console import Track
from buddy.engine.model import Choose, RoutedLM
from buddy.errors import BudgetError
from buddy.losses import cross_entropy
from buddy.measurements import Measurements, digest, tensor_bytes
from buddy.router import Context, Geometry


class Predictor(nn.Module):
    """Chooses the budget of each prompt for `--budget auto`.

    Args:
        arms: executed layers K to choose from.

    Attributes:
        name: "regress" or "grpo".
        arms: each K once, deepest first.
    """

    name: ClassVar[str]

    def __init__(self, arms: Iterable[int]) -> None:
        super().__init__()
        self.arms = sorted_arms(arms)

    def choose(self, features: Tensor, allowed: Sequence[int]) -> Tensor:
        """The chosen K (...) long of features (..., size), among the arms with the allowed indices."""
        raise NotImplementedError

    def chooser(self, most: int) -> Choose:
        """A function from contexts (...) to the chosen arms (...) long, of at most `most` layers.

        Raises:
            BudgetError: every arm has more layers.
        """
        allowed = [index for index, arm in enumerate(self.arms) if arm <= most]
        if not allowed:
            least = min(self.arms)
            raise BudgetError(
                f"The cap leaves {most} layers, but this run's predictor chooses at least {least}; raise the cap to "
                f"{least}layers or more, or use the budget {most}layers without auto."
            )
        return lambda context: self.choose(prompt_features(context), allowed)


def feature_size(geometry: Geometry) -> int:
    """Length of the feature vector, 2F + D."""
    return 2 * geometry.features + geometry.hidden


def prompt_features(context: Context) -> Tensor:
    """(..., 2F + D) float32: pooled states, newest states, the newest hidden state; each with mean 0 and variance 1."""
    parts = (context.pooled, context.newest, context.hidden)
    return torch.cat([F.layer_norm(part, part.shape[-1:]) for part in parts], -1)


def sorted_arms(counts: Iterable[int]) -> tuple[int, ...]:
    """Each number of layers once, deepest first."""
    return tuple(sorted(set(counts), reverse=True))


@dataclass(frozen=True)
class Targets:
    """Measurements of N requests, each a window whose first tokens are the prompt.

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
        """(N, arms) float64: how much higher the loss is under each arm than at full depth."""
        return self.at(arms) - self.losses[:, :1]


@torch.no_grad()
def measure_targets(
    routed: RoutedLM,
    batches: Sequence[Callable[[], Tensor]],
    arms: Sequence[int],
    *,
    prompt: int,
    store: Path | None = None,
    key: object = (),
    track: Track = iter,
) -> Targets:
    """Run windows under the router's own plans at each arm and at full depth.

    Args:
        routed: the model with its trained router.
        batches: each returns windows (B, W) long.
        arms: executed layers K.
        prompt: first tokens of a window, which give the features; the losses are of the others.
        store: folder of the measurements, so that the same call resumes after an interruption.
        key: all that the windows depend on.
        track: wraps the batches to show progress.
    """
    counts = sorted_arms([*arms, routed.geometry.layers])
    bridges = {} if routed.bridges is None else routed.bridges.state_dict()
    state = {**routed.router.state_dict(), **bridges}
    weights = digest(*(name.encode() + tensor_bytes(each) for name, each in sorted(state.items())))
    setting = {"weights": weights, "settings": routed.settings, "windows": key, "counts": counts, "prompt": prompt}
    setting["model"] = fingerprint(routed.backbone.model)  # of the weights now, with an adapter if there is one
    made = Measurements(store, setting)
    names = [(f"features {number}", f"losses {number}") for number in range(len(batches))]
    try:
        for (seen, lost), batch in zip(names, track(batches), strict=True):
            if made.missing([seen, lost]):
                ids = batch().to(routed.backbone.device)
                made[seen] = prompt_features(routed.context(ids[:, :prompt])).cpu()
                made[lost] = _losses(routed, ids, counts, prompt)
    finally:
        made.save()
    return Targets(counts, *(torch.cat([made[name] for name in column]) for column in zip(*names, strict=True)))


def _losses(routed: RoutedLM, ids: Tensor, counts: Sequence[int], prompt: int) -> Tensor:
    """(B, counts) float64, mean cross-entropy of the tokens after the prompt."""
    scored = torch.arange(prompt - 1, ids.shape[1] - 1, device=ids.device)
    losses = []
    for count in counts:
        logits = routed(ids, executed=torch.full((len(ids),), count), prompt=prompt, logits_to_keep=scored).logits
        losses.append(cross_entropy(logits, ids[:, scored + 1]).cpu().double().mean(1))
    return torch.stack(losses, 1)
