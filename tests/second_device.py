"""A second device, `other`, where there is no GPU: its tensors lie in the memory of the CPU, apart from the CPU's own.

An operation on tensors of both devices fails as it does on a GPU, and operations for whose results the host would wait
are counted; copies to the device and random generators are not checked. With `pytest -p tests.second_device` torch and
Lightning find it as this machine's accelerator, and so does Buddy.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "other"
INDEXING = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
COPYING = {"aten::copy_", "aten::_to_copy"}
MADE = (
    "empty.memory_format",
    "empty_strided",
    "arange",
    "arange.start",
    "arange.start_step",
    "randperm",
    "eye",
    "eye.m",
)
WAITING = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")}

waits: Counter[str] = Counter()  # operations whose result the host waited for, and copies to the host
registered: list[Any] = []  # the libraries of operators, which live as long as their objects


class OtherTensor(torch.Tensor):
    """A tensor of the second device, around one of the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OtherTensor":
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=torch.device(NAME, 0), **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})

    def tolist(self) -> Any:
        waits["tolist"] += 1
        return self.inner.tolist()

    def __format__(self, spec: str) -> str:
        waits["format"] += 1
        return format(self.inner, spec)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)  # a file holds the CPU's tensor

    def __repr__(self, **_: Any) -> str:
        return f"{self.inner!r} on {NAME}"


def run(function: Any, args: tuple, kwargs: dict) -> Any:
    """The operation on the CPU's tensors; the result is on the device of the arguments, or on the one asked for."""
    name, device = function._schema.name, kwargs.get("device")
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    others = [value for value in tensors if isinstance(value, OtherTensor)]
    if others and name not in COPYING:
        # As on a GPU, numbers may be the CPU's, and so may the indices into a tensor of the device.
        alike = [args[0], *args[2:3]] if name in INDEXING else tensors
        if any(isinstance(value, Tensor) and value.dim() and not isinstance(value, OtherTensor) for value in alike):
            raise RuntimeError(f"Expected all tensors to be on the same device, in {name}")
    there = bool(others) if device is None else torch.device(device).type == NAME
    _count(name, args, others, there)

    plain = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    plain |= {"device": "cpu"} if device else {}
    result = function(*map(_inner, args), **{key: _inner(value) for key, value in plain.items()})
    assert all(value.shape == value.inner.shape for value in others), f"{name} changes a shape in place"
    if function._schema.is_mutable:
        return None if result is None else next(value for value in (kwargs.get("out"), *tensors) if value is not None)
    return _outer(result) if there else result


def _count(name: str, args: tuple, others: list[Tensor], there: bool) -> None:
    """Count an operation that waits for the device: for a value, for a shape that depends on values, or for a copy."""
    masks = [value for value in args[1] if isinstance(value, OtherTensor)] if name in INDEXING else []
    if others and (name in WAITING or any(mask.dtype == torch.bool for mask in masks)):
        waits[name] += 1
    if others and (not there or (name == "aten::copy_" and not isinstance(args[0], OtherTensor))):
        waits["copy"] += 1


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _inner(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [*map(_inner, value)]
    return value.inner if isinstance(value, OtherTensor) else value


def _outer(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(_outer, value))
    return OtherTensor(value) if isinstance(value, Tensor) else value


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return run(torch.ops.aten.copy_.default, (target, source), {})


class Module(getattr(backend_registration, "_DummyBackendModule", object)):
    """What torch asks of a device's module, `torch.other`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


class Generator(torch.Generator):
    """Random numbers of either device are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


def register() -> None:
    """Make the device known to torch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    operators = torch.library.Library("aten", "IMPL")
    for name in MADE:
        base, _, overload = name.partition(".")
        function = getattr(getattr(torch.ops.aten, base), overload or "default")
        operators.impl(name, lambda *args, _made=function, **kwargs: _make(_made, args, kwargs), "PrivateUse1")
    operators.impl("_copy_from", _copy_from, "PrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(lambda function, *args, **kwargs: run(function, args, kwargs), "PrivateUse1")
    registered.extend([operators, others])
    torch.Generator = Generator
    torch.accelerator.synchronize = lambda device=None: None


def _make(function: Any, args: tuple, kwargs: dict) -> Tensor:
    return run(function, args, kwargs | {"device": torch.device(NAME)})


def pytest_configure() -> None:
    """Make it the accelerator of Lightning, too."""
    register()
    from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

    class Accelerator(CPUAccelerator):
        def setup_device(self, device: torch.device) -> None:
            pass

        @staticmethod
        def parse_devices(devices: Any) -> Any:
            return devices

        @staticmethod
        def get_parallel_devices(devices: Any) -> list[torch.device]:
            return [torch.device(NAME, 0)]

    AcceleratorRegistry.register(NAME, Accelerator, description=NAME)
    _AcceleratorConnector._choose_auto_accelerator = staticmethod(lambda: NAME)
    SingleDeviceStrategy.root_device = property(lambda _: torch.device(NAME, 0))
