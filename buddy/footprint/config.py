"""A backbone's shape from its configuration: real modules without weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from buddy.backbone.embedded import quiet_transformers
from buddy.backbone.load import DTYPES, EMBEDDED, check_routable
from buddy.errors import BackboneError, nearest

CHOICES = f"a folder with config.json, such a file, owner/name on the hub, or {' or '.join(map(repr, EMBEDDED))}"


def hollow_model(name: str, dtype: str) -> PreTrainedModel:
    """The model that a configuration describes, on torch's meta device: every size and no data.

    Args:
        name: of a backbone, as a recipe has it; or a folder with config.json, or that file.
        dtype: float32, bfloat16 or float16.

    Raises:
        BackboneError: no configuration is there, it is damaged, or Buddy cannot route such a model.
    """
    values = _read(name)
    check_routable(name, values)
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.for_model(**values)
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False).eval()
    except Exception as error:  # impossible sizes show as a dozen kinds of error, all the user's
        raise _damaged(name, error) from error


def _read(name: str) -> dict[str, Any]:
    path = os.path.expanduser(name)
    if name in EMBEDDED:
        path = str(EMBEDDED[name]())
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
        if not os.path.isfile(path):
            raise BackboneError(f"The folder {name!r} has no config.json; name {CHOICES}.")
    if os.path.isfile(path):
        return _read_file(name, Path(path))
    return _read_hub(name)


def _read_file(name: str, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(name, error) from error
    if not isinstance(values, dict):
        raise _damaged(name, ValueError("it is not a mapping"))
    return values


def _read_hub(name: str) -> dict[str, Any]:
    if not name.strip() or name.startswith(("/", ".", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise BackboneError(f"There is no configuration at {name!r}; give {CHOICES}.")
    if "/" not in name:  # as in `load_backbone`
        raise BackboneError(f"No model is named {name!r}{nearest(name, EMBEDDED) or f'; give {CHOICES}.'}")
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise BackboneError(f"No model {name!r} was found ({_reason(error)}); give {CHOICES}.") from error
    return values


def _damaged(name: str, error: Exception) -> BackboneError:
    return BackboneError(f"The configuration of {name!r} cannot be used ({_reason(error)}); mend it, or name another.")


def _reason(error: Exception) -> str:
    return shorten(str(error) or type(error).__name__, 200, placeholder=" …").rstrip(".")
