"""Checks of what a router keeps: through seeds and files, and on other backbones."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from buddy.engine.model import PoolKind
from buddy.errors import BuddyError
from buddy.io import load_tensors, save_tensors
from buddy.testing.answers import finite, repeatable
from buddy.testing.check import Failed, check, raised
from buddy.testing.sight import answer
from buddy.testing.subject import Subject

SIZES: tuple[tuple[int, int, PoolKind], ...] = ((5, 2, "value"), (7, 1, "both"))  # layers, context layer, pool


@check("two fits with one seed are one router", repeatable)
def seed(subject: Subject) -> str:
    """Made and calibrated twice."""
    seen = subject.seen
    if not torch.equal(answer(subject.router(), seen), answer(subject.router(), seen)):
        raise Failed(
            "Two routers made and calibrated with one seed differ; draw from torch's generator in __init__, "
            "and from probe.seed in calibrate."
        )
    return "to the bit"


@check("`seeded` says whether the seed matters", seed)
def seeded(subject: Subject) -> str:
    """`buddy compare` repeats a router over seeds only where it does."""
    if subject.cls.seeded:
        return "repeated over seeds"
    if not torch.equal(answer(subject.router(0), subject.seen), answer(subject.router(1), subject.seen)):
        raise Failed("Another seed gives another router, but seeded is False; set seeded = True in the class.")
    return "the seed changes nothing"


@check("all of it comes back from safetensors", seed)
def saved(subject: Subject) -> str:
    """Written, and loaded into a new router that was not calibrated and began from another seed."""
    router, again = subject.router(), subject.made(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "router.safetensors"
        save_tensors(path, router.state_dict(), {"format": "pt"})
        try:
            again.load_state_dict(load_tensors(path))
        except (RuntimeError, BuddyError) as error:
            reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
            raise Failed(
                f"What was saved does not fit a new router ({reason}); register every parameter and buffer in "
                "__init__, in its final shape."
            ) from error
    if not torch.equal(answer(router, subject.seen), answer(again, subject.seen)):
        raise Failed(
            "A router loaded from its file answers otherwise; keep all that was measured or drawn in "
            "parameters or buffers (register_buffer), for nothing else is saved."
        )
    size = sum(tensor.numel() for tensor in router.state_dict().values())
    return f"{size} numbers"


@check("other sizes of backbones too", finite)
def geometry(subject: Subject) -> str:
    """Other numbers of layers, a later context layer, a wider pool."""
    for layers, context_layer, pool in SIZES:
        case = f"{layers} layers, context_layer {context_layer} and pool {pool!r}"
        try:
            other = subject.elsewhere(layers, context_layer, pool)
            given = answer(other.router(), other.seen)
        except Exception as error:
            raise Failed(
                f"{raised(error, subject.cls)} on a backbone of {case}; take all sizes from geometry."
            ) from error
        if given.shape != (*other.seen.leading, other.geometry.routable) or not given.isfinite().all():
            raise Failed(
                f"On a backbone of {case} the answer has another shape or is not finite; take all sizes from geometry."
            )
    return f"{len(SIZES)} other backbones"
