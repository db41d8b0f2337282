"""Values between host and device. Those of a decode step pass here, since each wait for the device costs time."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def to_host(values: Tensor) -> Any:
    """The values as Python numbers. The caller waits for the device.

    A decode step calls it once, for the scores, since the host must know which layers run. The number of calls does not
    depend on how many rows decode.
    """
    return values.tolist()


def to_device(values: Any, device: torch.device) -> Tensor:
    """A tensor of Python numbers or of the host's. The caller does not wait for a CUDA device."""
    tensor = torch.as_tensor(values, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostCopy:
    """A copy of values on the host, begun now and read later, while the device computes on.

    On a device other than CUDA it is complete at once.
    """

    def __init__(self, values: Tensor) -> None:
        self._copy = values.to("cpu", non_blocking=values.is_cuda)
        self._complete = torch.cuda.Event() if values.is_cuda else None
        if self._complete is not None:
            self._complete.record(torch.cuda.current_stream(values.device))  # not that of another device

    @cached_property
    def values(self) -> Any:
        """The values as Python numbers."""
        if self._complete is not None:
            self._complete.synchronize()
        return self._copy.tolist()
