"""What a comparison was made on and with: never a host's name or a path."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import buddy

PACKAGES = ("torch", "transformers", "lightning", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Python, Buddy and the libraries that results depend on."""
    found = {"python": platform.python_version(), "buddy": buddy.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # installed without metadata
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, accelerator."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else str(accelerator) if accelerator else None
    return {"processor": _processor(), "cores": _cores(), "memory_gib": _memory(), "accelerator": name}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):  # not every system tells
        return None
