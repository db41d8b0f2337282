"""What a router is shown, and its answer: one interface to both kinds of router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from buddy.router import AnyRouter, Context, Router

PARTS = ("pooled", "newest", "hidden", "executed")


@dataclass(frozen=True)
class Sight:
    """What routers see of some tokens, leading dimensions (...).

    Attributes:
        context: for a `Router`.
        arriving: (R, ..., D) float32, the states that arrive at the routable layers, for a `LayerwiseRouter`.
    """

    context: Context
    arriving: Tensor

    @property
    def leading(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return tuple(self.context.executed.shape)

    def __getitem__(self, index: Any) -> Sight:
        """Some of the tokens, picked by the leading dimensions."""
        index = index if isinstance(index, tuple) else (index,)
        parts = (getattr(self.context, name)[index] for name in PARTS)
        return Sight(Context(*parts), self.arriving[(slice(None), *index)])

    def at(self, executed: int | Tensor) -> Sight:
        """The same tokens with another K, one for all or one for each."""
        asked = torch.as_tensor(executed, device=self.context.executed.device).expand(self.leading)
        return replace(self, context=replace(self.context, executed=asked))

    def map(self, change: Callable[[Tensor], Tensor]) -> Sight:
        """`change` made to all floating-point tensors."""
        pooled, newest, hidden = (change(getattr(self.context, name)) for name in PARTS[:3])
        return Sight(Context(pooled, newest, hidden, self.context.executed), change(self.arriving))

    def blend(self, other: Sight, where: Tensor) -> Sight:
        """`other` in the place of the tokens where `where` (...) says so."""
        pairs = [(getattr(self.context, name), getattr(other.context, name)) for name in PARTS[:3]]
        parts = [torch.where(where[..., None], two, one) for one, two in [*pairs, (self.arriving, other.arriving)]]
        pooled, newest, hidden, arriving = parts
        return Sight(Context(pooled, newest, hidden, self.context.executed), arriving)

    def to(self, device: str | torch.device) -> Sight:
        """A copy on a device."""
        moved = self.map(lambda x: x.to(device))
        return replace(moved, context=replace(moved.context, executed=self.context.executed.to(device)))

    def copy(self) -> Sight:
        """Tensors of its own, one beside the other in memory, as the engine's are."""
        copied = self.map(lambda x: x.contiguous().clone())
        return replace(copied, context=replace(copied.context, executed=self.context.executed.contiguous().clone()))


def outputs(router: AnyRouter, sight: Sight) -> list[Any]:
    """What the router gives: its scores alone, or the logits of one gate after the other."""
    if isinstance(router, Router):
        return [router.score(sight.context)]
    executed = sight.context.executed
    return [router.gate(index, hidden, executed) for index, hidden in enumerate(sight.arriving)]


@torch.no_grad()
def answer(router: AnyRouter, sight: Sight) -> Tensor:
    """(..., R): scores, or the logits of all gates beside each other; the router gets copies."""
    given = outputs(router, sight.copy())
    return given[0] if isinstance(router, Router) else torch.stack(given, -1)


def decisions(router: AnyRouter, answers: Tensor) -> Tensor:
    """(..., R): the order of the layers by their scores, or which gates are open."""
    if isinstance(router, Router):
        return answers.argsort(dim=-1, descending=True, stable=True)
    return answers > 0


def alike(one: Tensor, two: Tensor) -> Tensor:
    """(...) bool: tokens whose answers (..., R) differ by no more than rounding.

    Measured by how far the layers' numbers lie apart, so that a large number common to all hides nothing.
    """
    spread = (one - one.mean(-1, keepdim=True)).abs().amax()
    return ((one - two).abs() <= 1e-4 * spread + 1e-5 * one.abs().amax()).all(-1)
