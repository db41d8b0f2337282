"""Checks of a router's state: seeds, files, other backbones, and training."""

from __future__ import annotations

import copy
import tempfile
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from buddy.engine.model import PoolKind
from buddy.errors import BuddyError
from buddy.io import load_tensors, save_tensors
from buddy.router import AnyRouter, LayerwiseRouter
from buddy.testing.answers import alone, finite, repeatable
from buddy.testing.check import Failed, LeftOut, check
from buddy.testing.subject import PROMPT, ROWS, Subject, answer, outputs, raised

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


@check("every parameter is trained once", alone)
def groups(subject: Subject) -> str:
    """By `parameter_groups`, each with a factor on the recipe's learning rate."""
    router = _trainable(subject)
    parts = router.parameter_groups()
    for part in parts:
        if not {"params", "scale"} <= {*part} or not part["scale"] > 0:
            raise Failed('parameter_groups holds a group without "params" or with no "scale" above 0; give both.')
    given = [id(parameter) for parameter in chain.from_iterable(part["params"] for part in parts)]
    for name, parameter in router.named_parameters():
        times = given.count(id(parameter))
        if parameter.requires_grad and times != 1:
            raise Failed(f"parameter_groups names {name} {times} times; name each parameter that is trained once.")
    return f"{sum(p.numel() for p in router.parameters() if p.requires_grad)} numbers"


@check("gates weigh between 0 and 1, and a row has one penalty", alone)
def weights(subject: Subject) -> str:
    """`weigh` and `penalty` of a layerwise router, which alone has them."""
    router = _trainable(subject)
    if not isinstance(router, LayerwiseRouter):
        raise LeftOut("for layerwise routers")
    logits = torch.linspace(-9, 9, 7, device=subject.backbone.device).expand(ROWS, -1)
    given = router.weigh(logits)
    if given.shape != logits.shape or not bool(((given >= -1e-6) & (given <= 1 + 1e-6)).all()):
        raise Failed("weigh leaves [0, 1] or the shape of its logits; give each logit one weight, as sigmoid does.")
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(ROWS, PROMPT, subject.geometry.routable, generator=generator).to(logits.device)
    penalty = router.penalty(shares, torch.full((ROWS,), subject.middle, device=logits.device))
    if penalty.shape != (ROWS,) or not penalty.isfinite().all():
        raise Failed(f"penalty gives {tuple(penalty.shape)} for {ROWS} rows, or is not finite; give one number a row.")
    return "one weight a gate, one penalty a row"


@check("gradients reach every parameter", weights, groups)
def gradients(subject: Subject) -> str:
    """Through scores, or through the weights of gates in the engine."""
    router = _trainable(subject)
    try:
        copy.deepcopy(router)  # as training does, to keep the start
    except Exception as error:
        raise Failed(f"{raised(error, subject.cls)} when copied; keep no files, locks or lambdas in it.") from error
    loss = _of_gates(subject, router) if isinstance(router, LayerwiseRouter) else _of_scores(subject, router)
    if not loss.requires_grad:
        raise Failed(f"The answer hangs on no parameter; {_cut(subject)}.")
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    for name, parameter in router.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None or not parameter.grad.any():
            raise Failed(f"No gradient reaches {name}; {_cut(subject)}, or freeze it (requires_grad_(False)).")
        if not parameter.grad.isfinite().all():
            raise Failed(f"The gradient of {name} is not finite; guard roots, logarithms and divisions.")
    return f"{sum(p.requires_grad for p in router.parameters())} tensors"


def _trainable(subject: Subject) -> AnyRouter:
    router = subject.router()
    if not router.trainable:
        raise LeftOut("nothing to train")
    router.train()
    return router


def _of_scores(subject: Subject, router: AnyRouter) -> Tensor:
    scores: Tensor = outputs(router, subject.seen.copy())[0]
    return (scores * _noise(scores)).sum()


def _of_gates(subject: Subject, router: LayerwiseRouter) -> Tensor:
    executed = torch.full((ROWS,), subject.middle, device=subject.backbone.device)
    with subject.attached(router) as routed:
        output = routed(subject.windows, executed=executed, prompt=PROMPT, gate_weighted=True)
    logits: Tensor = output.logits
    return (logits * _noise(logits)).mean() + router.penalty(output.weights, executed).mean()


def _noise(like: Tensor) -> Tensor:
    """Numbers that no symmetry of the scores can cancel."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)


def _cut(subject: Subject) -> str:
    return f"use no detach, no_grad, sign, argmax or item on its way through {subject.asked}"
