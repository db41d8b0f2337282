"""All that measured values depend on, to the last bit."""

from __future__ import annotations

import hashlib
import json
import platform
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from buddy.engine.model import RoutedLM

LAYOUT = 1  # raise it when values are measured in another way: older ones are then not found
SAMPLE = 1024  # values of each parameter that stand for all of them


def setting_of(routed: RoutedLM, windows: Tensor, batch_size: int) -> dict[str, Any]:
    """Names and values, the same in another process that would measure the same numbers.

    The rounding of a sum depends on the size of a batch, the number of threads and the machine's instructions, so they
    are here too.

    Args:
        routed: the model.
        windows: (N, W) long.
        batch_size: windows per forward.
    """
    backbone = routed.backbone
    return {
        "layout": LAYOUT,
        "backbone": backbone.fingerprint,
        "configuration": _configuration(backbone.model.config),
        "weights": _digest(*(_sample(parameter) for parameter in backbone.model.parameters())),
        "dtype": backbone.dtype,
        "attention": backbone.model.config._attn_implementation,
        "device": _device(backbone.device),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "windows": _digest(windows.cpu()),
        "shape": tuple(windows.shape),
        "batch_size": batch_size,
        "sink_tokens": routed.sink_tokens,
        "context_layer": routed.geometry.context_layer,
    }


def _configuration(config: PreTrainedConfig) -> str:
    """A digest of all that a model's configuration says but where it came from."""
    said = config.to_dict()
    for origin in ("_name_or_path", "transformers_version"):
        said.pop(origin, None)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLE)].cpu()


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
