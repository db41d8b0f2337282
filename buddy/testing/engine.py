"""Checks of a router at work in the engine, on other devices and in 16 bits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from buddy.engine.model import RoutedLM
from buddy.testing.answers import alone
from buddy.testing.check import Failed, LeftOut, check
from buddy.testing.state import saved
from buddy.testing.subject import LENGTH, PROMPT, ROWS, Subject, answer, outputs, raised, tiny_backbone

TURNS, LONGEST = 30, 0.5  # timed answers at most, and seconds for all of them
ABSURD = 0.1  # seconds for one token, which a whole model decodes in less


@check("every token runs exactly K layers, for each K", alone)
def counts(subject: Subject) -> str:
    """As the layers themselves recorded it: each K for all rows, and different ones side by side."""
    depths, router = subject.depths, subject.router()
    asked = [[depth] * ROWS for depth in depths]
    asked.append([depths[row % len(depths)] for row in range(ROWS)])
    with subject.attached(router) as routed:
        for executed in asked:
            wanted = torch.tensor(executed, device=subject.backbone.device)
            output = routed(subject.windows, executed=wanted, prompt=PROMPT)
            exact(output.executed, output.sinks, wanted)
        for depth in {depths[0], subject.middle, depths[-1]}:
            with routed.at(executed=[depth]) as record:
                _steps(routed, subject.windows)
            for ran, sinks in zip(record.executed, record.sinks, strict=True):
                exact(ran, sinks, torch.full((ROWS,), depth, device=ran.device))
    return f"K from {depths[0]} to {depths[-1]}"


@check("decoding follows the plans of training", counts)
def decoding(subject: Subject) -> str:
    """A window read at once, and as a prompt and then token by token."""
    with subject.attached(subject.router()) as routed:
        executed = [subject.middle] * ROWS
        wanted = torch.tensor(executed, device=subject.backbone.device)
        whole = routed(subject.windows, executed=wanted, prompt=PROMPT).runs
        with routed.at(executed=executed) as record:
            _steps(routed, subject.windows)
        stepped = torch.cat(record.runs, 1)
    other = (whole != stepped).any(-1).float().mean().item()
    if other:
        raise Failed(
            f"Token by token {other:.0%} of the plans are others than for the window at once; {subject.asked} may "
            "depend on nothing but the token's own entries of the context."
        )
    return f"{ROWS} × {LENGTH} plans"


@check("the time for one token, refused above 0.1 s", alone)
@torch.no_grad()
def speed(subject: Subject) -> str:
    """The time for one token, as decoding asks; shown, and refused only where it is absurd."""
    router, sight = subject.router(), subject.seen[:1, :1].copy()
    seconds: list[float] = []
    end = time.perf_counter() + LONGEST
    while len(seconds) < TURNS and (not seconds or time.perf_counter() < end):
        start = time.perf_counter()
        _settled(outputs(router, sight))
        seconds.append(time.perf_counter() - start)
    taken = median(seconds)
    if taken > ABSURD:
        raise Failed(
            f"One answer for one token takes {taken:.2g} s; compute in __init__ or calibrate what does not change."
        )
    return f"{1e6 * taken:.0f} µs a token" + (", all gates" if subject.asked == "gate" else "")


@torch.no_grad()
def _steps(routed: RoutedLM, windows: Tensor) -> None:
    """A prompt, then one token after the other, as `generate` does it."""
    model, cache = routed.backbone.model, None
    for first, end in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, windows.shape[1]))]:
        cache = model(windows[:, first:end], cache=cache, use_cache=True).cache


def exact(ran: Tensor, sinks: Tensor, wanted: Tensor) -> None:
    """Raises `Failed` unless each row's tokens ran the layers wanted, sinks apart: (B, T), (B, T) and (B,)."""
    wrong = (ran != wanted[:, None]) & ~sinks
    if wrong.any():
        row, token = wrong.nonzero()[0].tolist()
        raise Failed(
            f"{int(wrong.sum())} tokens did not run the layers asked for ({int(ran[row, token])} instead of "
            f"{int(wanted[row])}); leave the backbone, its layers and geometry alone, since the engine counts on them."
        )


def _settled(given: list[Tensor]) -> None:
    """Wait until a device has really answered."""
    given[-1].sum().item()


MOVERS = ("to", "copy_", "type_as", "expand_as", "view_as", "reshape_as")  # take a tensor from anywhere
STAY = (
    "keep tensors in parameters or buffers (register_buffer), which move with the router, and make new ones with "
    "device=context.executed.device"
)


class DeviceMismatch(RuntimeError):
    """Tensors of two devices in one operation."""


class _Watch(TorchFunctionMode):
    """Refuses to mix a device with the CPU; the device `meta` itself lets some of it pass."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(function) or getattr(function, "__name__", "")).rpartition(".")[2]
        places = [tensor.device.type for tensor in _tensors((args, kwargs or {})) if tensor.dim()]
        by_host = name in ("__getitem__", "__setitem__") and places[:1] != ["cpu"]  # indices may lie on the host
        if len({*places}) > 1 and name not in MOVERS and not by_host:
            raise DeviceMismatch(f"{name.strip('_')} of tensors on the router's device and on the CPU")
        return function(*args, **(kwargs or {}))


@check("it moves to another device", saved, alone)
def device(subject: Subject) -> str:
    """A real one where there is one, else torch's device `meta`, which computes shapes and places alone."""
    real = torch.accelerator.is_available()
    place: Any = torch.accelerator.current_accelerator() if real else torch.device("meta")
    router, seen = (subject.router() if real else subject.made()).to(place), subject.seen.to(place)
    try:
        with _Watch():
            given = answer(router, seen)
    except Exception as error:
        if real or isinstance(error, DeviceMismatch):
            raise Failed(f"{raised(error, subject.cls)}; {STAY}.") from error
        raise LeftOut(f"{subject.asked} reads numbers on the host, so only a real device can tell") from error
    if given.device.type != place.type:
        raise Failed(f"The answer lies on {given.device} where the context is on another device; {STAY}.")
    return str(place) if real else "by its stand-in, meta"


@check("it works on a backbone in bfloat16", device)
def bfloat16(subject: Subject) -> str:
    """Contexts and what a probe measures stay float32, and so must the answer."""
    held = tiny_backbone()
    low = Subject(subject.cls, subject.options, replace(held, model=held.model.to(torch.bfloat16)))
    with low.attached(low.router()) as routed:
        wanted = torch.full((ROWS,), low.middle, device=low.backbone.device)
        output = routed(low.windows, executed=wanted, prompt=PROMPT)
    exact(output.executed, output.sinks, wanted)
    given = answer(low.router(), low.seen)
    if given.dtype != torch.float32:
        raise Failed(f"On a backbone in bfloat16 {subject.asked} gives {given.dtype}; keep what it knows in float32.")
    return "float32, exact counts"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
