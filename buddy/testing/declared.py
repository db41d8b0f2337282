"""Checks of what a router says of itself and of its calibration."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from buddy.testing.check import Failed, check, raised
from buddy.testing.subject import Subject

KINDS, SCOPES = ("static", "learned", "random"), ("token", "prompt")


@check("a summary, a kind and a source for `buddy routers`")
def description(subject: Subject) -> str:
    """A docstring's first line, `kind`, `source`, and what the engine goes by."""
    cls, router = subject.cls, subject.made()
    summary = (cls.__dict__.get("__doc__") or "").strip().partition("\n")[0]
    if not summary:
        raise Failed("The class has no docstring; its first line is what `buddy routers` shows, so write one.")
    if cls.kind not in KINDS:
        raise Failed(f"kind is {cls.kind!r}; set it to one of {', '.join(map(repr, KINDS))}.")
    if not isinstance(cls.source, str) or not cls.source.strip():
        raise Failed(f"source is {cls.source!r}; name where the method was published, or leave it out.")
    if router.scope not in SCOPES:
        raise Failed(f"scope is {router.scope!r}; set it to one of {', '.join(map(repr, SCOPES))}.")
    for flag in ("full_depth", "seeded"):
        if not isinstance(getattr(cls, flag), bool):
            raise Failed(f"{flag} is {getattr(cls, flag)!r}; set it to True or False.")
    if getattr(router, "geometry", None) != subject.geometry:
        raise Failed("geometry is not what the router was made with; call super().__init__(geometry) and keep it.")
    return summary


@check("calibrate works, and leaves the model as it was", description)
def calibration(subject: Subject) -> str:
    """What `buddy fit` does first. The frozen model is everybody's."""
    model = subject.backbone.model
    before = _sums(model)
    try:
        subject.calibrated()
    except Exception as error:
        raise Failed(f"{raised(error, subject.cls)} in calibrate; mend it there.") from error
    after = _sums(model)
    if changed := [name for name in before if after.get(name) != before[name]]:
        raise Failed(f"calibrate changes the model ({changed[0]}); work on copies of its weights and buffers.")
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise Failed("calibrate leaves model parameters that ask for gradients; freeze them again.")
    return "the model is unchanged"


@torch.no_grad()
def _sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Two sums of each parameter and buffer: a copy of a large model would take its memory again."""
    held = chain(model.named_parameters(), model.named_buffers())
    return {name: (float(tensor.sum()), float(tensor.float().norm())) for name, tensor in held}
