"""What the next forwards are asked for, what holds for all of them, and who decides for whom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from buddy.errors import BuddyError, BudgetError
from buddy.plan import Plan
from buddy.router import AnyRouter, Context


@dataclass(frozen=True)
class Request:
    """What the next forwards are asked for: K per row, or a plan made elsewhere.

    Attributes:
        executed: K for each row of the batch, or one for all; None for full depth.
        runs: (B, T, L) bool, a plan to run instead of the router's.
        gates: (B, T, L) with gradients, for straight-through training.
        prompt: length of the prompt in these tokens; None in generation, where the first forward is the prompt.
        everything: compute each layer on every token and choose afterwards.
        weighted: multiply what each layer adds by a layerwise router's weight, with gradients.
        choose: K (B,) for the contexts (B,) of prompts, where a predictor chooses it.
    """

    executed: tuple[int, ...] | None = None
    runs: Tensor | None = None
    gates: Tensor | None = None
    prompt: int | None = None
    everything: bool = False
    weighted: bool = False
    choose: Callable[[Context], Tensor] | None = None


@dataclass(frozen=True)
class Settings:
    """What holds for all forwards of a routed model."""

    layers: int
    context_layer: int
    sink_tokens: int
    prompt_plan: str
    batch_plan: str
    reroute_every: int | None


def deciders(length: int, first: int, every: int | None, device: torch.device | None = None) -> Tensor:
    """(T,) long: for each of `length` tokens the index of the one whose decision it follows.

    Args:
        first: index of the prompt's last token among them; negative where it lies before them, as indices then may be.
        every: after it only each `every`-th token decides; None: none does.
    """
    since = torch.arange(length, device=device) - first  # tokens since the last one of the prompt
    return first + torch.where(since > 0, since - (since % every if every else since), since)


def held_scores(scores: Tensor, first: int, every: int | None, before: Tensor | None = None) -> Tensor:
    """Scores (B, T, R) that hold where only every `every`-th token after position `first` decides (None: none does).

    Args:
        first: index of the prompt's last token among the T; negative where it lies before them.
        before: (B, 1, R), the scores that hold from before these tokens.
    """
    if every == 1:
        return scores
    at = deciders(scores.shape[1], first, every, scores.device)
    held = scores[:, at.clamp(min=0)]
    return held if before is None else torch.where((at < 0)[None, :, None], before, held)


def plan_tokens(scores: Tensor, executed: Tensor, layers: int, shared: int = 0) -> Tensor:
    """(B, T, L) bool from scores (B, T, R) and K (B, T); the first `shared` tokens take their last one's plan."""
    runs = Plan.from_scores(scores, executed, layers).runs
    if shared:
        last = runs[:, shared - 1 : shared]
        runs = torch.cat([last.expand(-1, shared, -1), runs[:, shared:]], 1)
    return runs


def within_scope(router: AnyRouter, settings: Settings) -> Settings:
    """The settings that hold for a router: those of one plan an input, where that is its scope."""
    if router.scope == "token":
        return settings
    if router.scope != "prompt":
        raise BuddyError(f"The scope of {type(router).__name__} is {router.scope!r}; make it 'token' or 'prompt'.")
    return replace(settings, prompt_plan="shared", reroute_every=None)


def for_rows(request: Request, batch: int) -> Request:
    """The request for B rows; beams repeat its rows."""
    given = len(request.executed)
    if given in (1, batch):
        return request
    if batch % given:
        raise BudgetError(f"{given} budgets were given for {batch} rows; give one, or one per row.")
    return replace(request, executed=tuple(k for k in request.executed for _ in range(batch // given)))


def checked_mask(mask: Tensor | None) -> Tensor | None:
    """The mask (B, positions), or None where it hides nothing."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise BudgetError("Routing needs the attention mask in two dimensions (rows × tokens); pass that, or none.")
    return None if bool(mask.all()) else mask


def wants_cache(config: PreTrainedConfig, kwargs: dict[str, Any]) -> bool:
    """Whether a forward with these arguments fills a cache."""
    asked = kwargs.get("use_cache")
    return config.use_cache if asked is None else asked
