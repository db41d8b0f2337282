"""Checks of a router that goes elsewhere: to another device, and onto a backbone in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from buddy.testing.answers import alone
from buddy.testing.check import Failed, LeftOut, check, raised
from buddy.testing.kept import saved
from buddy.testing.model import tiny_backbone
from buddy.testing.running import exact
from buddy.testing.sight import answer
from buddy.testing.subject import PROMPT, ROWS, Subject

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
