"""Checks of a router's state, training, devices, and of its plans in the engine."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer

from buddy.engine.model import PoolKind, RoutedLM
from buddy.errors import BuddyError, raised
from buddy.router import AnyRouter, LayerwiseRouter
from buddy.run_files import load_router, save_router
from buddy.testing.check import Failed, check, explained
from buddy.testing.outputs import finite, independent, repeatable
from buddy.testing.subject import LENGTH, PROMPT, ROWS, Subject, output_of, raw_outputs, tiny_backbone

SIZES: tuple[tuple[int, int, PoolKind], ...] = ((5, 2, "value"), (7, 1, "both"))  # layers, context layer, pool
SLOW = 0.1  # seconds for one token, in which a whole model decodes one
MOVERS = ("to", "copy_", "type_as", "expand_as", "view_as", "reshape_as")  # operations that take tensors of any device
MOVING = (
    "keep tensors in parameters or buffers (register_buffer), which move with the router, and make new ones with "
    "device=context.executed.device"
)


# State


@check("two fits with the same seed give the same router; `seeded` says whether another seed matters", repeatable)
def seed(subject: Subject) -> str:
    one, two, other = (output_of(subject.router(seed), subject.inputs) for seed in (0, 0, 1))
    if not torch.equal(one, two):
        raise Failed(
            "Two routers made and calibrated with one seed differ; draw from torch's generator in __init__, "
            "and from probe.seed in calibrate."
        )
    if not subject.cls.seeded and not torch.equal(one, other):
        raise Failed("Another seed gives another router, but seeded is False; set seeded = True in the class.")
    return "comparisons repeat it over seeds" if subject.cls.seeded else "the seed changes nothing"


@check("saving and loading restores the router exactly", seed)
def saved(subject: Subject) -> str:
    """Loaded into a new router that was made with another seed and not calibrated."""
    router, again = subject.router(), subject.new_router(seed=1)
    if router.scope != again.scope:
        raise Failed(f"calibrate sets scope to {router.scope!r}, which is not saved; set it in __init__.")
    with tempfile.TemporaryDirectory() as folder:
        save_router(Path(folder), router.state_dict())
        try:
            again.load_state_dict(load_router(Path(folder)))
        except (RuntimeError, BuddyError) as error:
            mismatch = str(error).strip().splitlines()[-1].strip().rstrip(".")
            raise Failed(
                f"What was saved does not fit a new router ({mismatch}); register every parameter and buffer in "
                "__init__, in its final shape."
            ) from error
    if not torch.equal(output_of(router, subject.inputs), output_of(again, subject.inputs)):
        raise Failed(
            "A router loaded from its file gives other outputs; keep measured and random values in "
            "parameters or buffers (register_buffer): nothing else is saved."
        )
    return f"{sum(tensor.numel() for tensor in router.state_dict().values())} numbers"


@check("other sizes of backbones too", finite)
def geometry(subject: Subject) -> str:
    for layers, context_layer, pool in SIZES:
        case = f"on a backbone of {layers} layers, context_layer {context_layer} and pool {pool!r}"
        with explained(subject, f"{case}; take all sizes from geometry."):
            backbone = tiny_backbone(layers)
            other = Subject(subject.cls, subject.options, backbone, context_layer=context_layer, pool=pool)
            output = output_of(other.router(), other.inputs)
        if output.shape != (ROWS, LENGTH, other.geometry.routable) or not output.isfinite().all():
            raise Failed(f"Another shape or numbers that are not finite {case}; take all sizes from geometry.")
    return f"{len(SIZES)} other backbones"


# Devices and dtypes


class DeviceMismatch(RuntimeError):
    """Tensors of two devices in one operation."""


class _RefuseMixedDevices(TorchFunctionMode):
    """Raises `DeviceMismatch` for operations that mix a device with the CPU; the device `meta` allows some of them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(function) or getattr(function, "__name__", "")).rpartition(".")[2]
        given = tree_leaves((args, kwargs or {}))
        devices = [each.device.type for each in given if isinstance(each, Tensor) and each.dim()]
        indexed = name in ("__getitem__", "__setitem__") and devices[:1] != ["cpu"]  # indices may be on the CPU
        if len({*devices}) > 1 and name not in MOVERS and not indexed:
            raise DeviceMismatch(f"{name.strip('_')} of tensors on the router's device and on the CPU")
        return function(*args, **(kwargs or {}))


@check("it moves to another device", saved, independent)
def device(subject: Subject) -> str:
    """An accelerator where there is one, else torch's device `meta`, which computes shapes and devices alone."""
    real = torch.accelerator.is_available()
    target: Any = torch.accelerator.current_accelerator() if real else torch.device("meta")
    router = (subject.router() if real else subject.new_router()).to(target)
    inputs = subject.inputs.to(target)
    try:
        with _RefuseMixedDevices():
            output = output_of(router, inputs)
    except Exception as error:
        if real or isinstance(error, DeviceMismatch):
            raise Failed(f"{raised(error, subject.cls)}; {MOVING}.") from error
        raise SkipTest(f"{subject.method} reads numbers on the host, so only a real device can tell") from error
    if output.device.type != target.type:
        raise Failed(f"The output is on {output.device}, but the context is on another device; {MOVING}.")
    return str(target) if real else "by its stand-in, meta"


@check("it works on a backbone in bfloat16", device)
def bfloat16(subject: Subject) -> str:
    """Contexts and what a probe measures stay float32, and so must the output."""
    backbone = tiny_backbone()
    backbone = replace(backbone, model=backbone.model.to(torch.bfloat16))
    sizes = subject.geometry
    low = Subject(subject.cls, subject.options, backbone, context_layer=sizes.context_layer, pool=subject.pool)
    with low.attached(low.router()) as routed:
        _run(routed, low, [low.middle] * ROWS)
    scores = output_of(low.router(), low.inputs)
    if scores.dtype != torch.float32:
        raise Failed(f"On a backbone in bfloat16 {subject.method} gives {scores.dtype}; keep what it knows in float32.")
    return "float32, exact counts"


# Plans in the engine


@check("exactly K layers for every token, and in decode those of training", independent)
def plans(subject: Subject) -> str:
    """As the layers record it: each K for all rows, and several K in one batch, also token by token."""
    depths = subject.depths
    mixed = [depths[len(depths) * part // (ROWS + 1)] for part in range(1, ROWS + 1)]
    with subject.attached(subject.router()) as routed:
        for depth in depths:
            _run(routed, subject, [depth] * ROWS)
        parallel = _run(routed, subject, mixed)
        with routed.at(executed=mixed) as record:
            _decode(routed, subject.windows)
    for executed, sinks in zip(record.executed, record.sinks, strict=True):
        _check_counts(executed, sinks, mixed)
    differ = (parallel != torch.cat(record.runs, 1)).any(-1).float().mean().item()
    if differ:
        raise Failed(
            f"Token by token {differ:.0%} of the plans differ from those of the whole window; {subject.method} may "
            "depend on nothing but the token's own entries of the context."
        )
    return f"K from {depths[0]} to {depths[-1]}"


def _run(routed: RoutedLM, subject: Subject, executed: list[int]) -> Tensor:
    """(B, T, L) bool: the layers that ran for the windows at a K for each row; raises `Failed` for other counts."""
    wanted = torch.tensor(executed, device=subject.backbone.device)
    output = routed(subject.windows, executed=wanted, prompt=PROMPT)
    _check_counts(output.executed, output.sinks, executed)
    runs: Tensor = output.runs
    return runs


@torch.no_grad()
def _decode(routed: RoutedLM, windows: Tensor) -> None:
    """A prompt, then one token after the other, as `generate` does it."""
    model, cache = routed.backbone.model, None
    for first, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, windows.shape[1]))]:
        cache = model(windows[:, first:end], cache=cache, use_cache=True).cache


def _check_counts(executed: Tensor, sinks: Tensor, wanted: list[int]) -> None:
    """Raises `Failed` unless each row's tokens ran the layers wanted, sinks apart: (B, T), (B, T) and B."""
    wrong = (executed != torch.tensor(wanted, device=executed.device)[:, None]) & ~sinks
    if wrong.any():
        row, token = wrong.nonzero()[0].tolist()
        raise Failed(
            f"{int(wrong.sum())} tokens ran another number of layers ({int(executed[row, token])} instead of "
            f"{wanted[row]}); leave the backbone, its layers and geometry alone, since the engine counts on them."
        )


@check("the time for one token, refused above 0.1 s", independent)
@torch.no_grad()
def speed(subject: Subject) -> str:
    """As in decoding; all gates of a layerwise router together."""
    call = {"raw_outputs": raw_outputs, "router": subject.router(), "inputs": subject.inputs[:1, :1].copy()}
    timer = Timer("raw_outputs(router, inputs)", globals=call, num_threads=torch.get_num_threads())
    seconds = timer.blocked_autorange(min_run_time=0.1).median
    if seconds > SLOW:
        raise Failed(
            f"One answer for one token takes {seconds:.2g} s; compute in __init__ or calibrate what does not change."
        )
    return f"{1e6 * seconds:.0f} µs per token"


# Training


@check("every parameter is trained once", independent)
def groups(subject: Subject) -> str:
    router = _trainable(subject)
    parts = router.parameter_groups()
    for part in parts:
        if {*part} - {"scale"} != {"params"} or not 0 < part.get("scale", 1.0) < math.inf:
            raise Failed(
                'parameter_groups has a group of other keys; give "params" and a finite "scale" above 0 alone.'
            )
    listed = [id(parameter) for part in parts for parameter in part["params"]]
    if {*listed} - {id(parameter) for parameter in router.parameters()}:
        raise Failed("parameter_groups names a tensor that is no parameter of the router; register it as one.")
    trained = {name: p for name, p in router.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if (times := listed.count(id(parameter))) != 1:
            raise Failed(f"parameter_groups names {name} {times} times; name each parameter that is trained once.")
    return f"{sum(map(Tensor.numel, trained.values()))} numbers"


@check("gates weigh between 0 and 1, and a row has one penalty", independent)
def weights(subject: Subject) -> str:
    """`weigh` and `penalty`, which layerwise routers alone have."""
    router = _trainable(subject)
    if not isinstance(router, LayerwiseRouter):
        raise SkipTest("for layerwise routers")
    logits = torch.linspace(-9, 9, 7, device=subject.backbone.device).expand(ROWS, -1)
    found = router.weigh(logits)
    if found.shape != logits.shape or not bool(((found >= -1e-6) & (found <= 1 + 1e-6)).all()):
        raise Failed("weigh leaves [0, 1] or the shape of its logits; give each logit one weight, as sigmoid does.")
    closed, opened = router.weigh(torch.tensor([-50.0, 50.0], device=logits.device)).tolist()  # far beyond any noise
    if not closed < 0.5 < opened:
        raise Failed(
            "weigh gives less to an open gate than to a closed one; a gate is open where its logit is above 0."
        )
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(ROWS, PROMPT, subject.geometry.routable, generator=generator).to(logits.device)
    shares.requires_grad_()
    for executed in subject.depths[:-1]:
        counts = torch.full((ROWS,), executed, device=logits.device)
        penalty = router.penalty(shares, counts)
        if penalty.shape != (ROWS,) or not penalty.isfinite().all():
            raise Failed(
                f"penalty gives {tuple(penalty.shape)} for {ROWS} rows, or is not finite, at K = {executed}; give one "
                "finite number per row."
            )
        extremes = [router.penalty(torch.full_like(shares, share), counts) for share in (0.0, 1.0)]
        if not penalty.requires_grad and not torch.equal(*extremes):
            raise Failed("penalty has no gradient; compute it from the weights, without comparing or rounding them.")
    counts = torch.tensor(subject.depths[:-1], device=logits.device).repeat(ROWS)[:ROWS]
    rows = [router.penalty(shares[row : row + 1], counts[row : row + 1]) for row in range(ROWS)]
    if not torch.allclose(router.penalty(shares, counts), torch.cat(rows), rtol=1e-4, atol=1e-6):
        raise Failed("The penalty of a row changes with the others; take means over its own tokens and layers alone.")
    return "one weight a gate, one penalty a row"


@check("gradients reach every parameter", weights, groups)
def gradients(subject: Subject) -> str:
    """Through scores, or through the weights of gates in the engine."""
    router = _trainable(subject)
    advice = f"use no detach, no_grad, sign, argmax or item on its way through {subject.method}"
    if isinstance(router, LayerwiseRouter):
        executed = torch.full((ROWS,), subject.middle, device=subject.backbone.device)
        with subject.attached(router) as routed:
            output = routed(subject.windows, executed=executed, prompt=PROMPT, gate_weighted=True)
        loss = (output.logits * _noise(output.logits)).mean() + router.penalty(output.weights, executed).mean()
    else:
        scores = raw_outputs(router, subject.inputs.copy())[0]
        loss = (scores * _noise(scores)).sum()
    if not loss.requires_grad:
        raise Failed(f"The answer depends on no parameter; {advice}.")
    loss.backward()
    for name, parameter in router.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None or not parameter.grad.any():
            raise Failed(f"No gradient reaches {name}; {advice}, or freeze it (requires_grad_(False)).")
        if not parameter.grad.isfinite().all():
            raise Failed(f"The gradient of {name} is not finite; guard roots, logarithms and divisions.")
    return f"{sum(p.requires_grad for p in router.parameters())} tensors"


def _trainable(subject: Subject) -> AnyRouter:
    router = subject.router()
    if not router.trainable:
        raise SkipTest("nothing to train")
    router.train()
    return router


def _noise(like: Tensor) -> Tensor:
    """Random weights, so that no symmetry of the scores cancels in their sum."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
