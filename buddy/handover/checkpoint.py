"""A plan as a checkpoint of fewer layers in the hub's layout, and the proof that it computes what the plan does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from buddy.backbone.embedded import quiet_transformers
from buddy.backbone.load import ATTENTION, Backbone
from buddy.engine.model import RoutedLM
from buddy.errors import RunError
from buddy.io import writing
from buddy.scoring.timing import PER_LAYER, pruned_model

CLOSE = 1e-4  # how far logits in float32 may lie apart


def write_checkpoint(folder: Path, backbone: Backbone, kept: Sequence[int]) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer into an empty folder.

    Args:
        folder: where.
        backbone: the whole model, routed or not; it stays as it is.
        kept: indices of the layers to keep, rising.

    Raises:
        RunError: the folder cannot be written.
    """
    small = pruned_model(backbone.model, kept)
    small.generation_config = backbone.model.generation_config
    with quiet_transformers(), writing(folder):
        try:
            small.save_pretrained(folder)
        except SafetensorError as error:  # how a full disk shows
            raise OSError(str(error)) from error
        backbone.tokenizer.save_pretrained(folder)
        for path in folder.glob("*.safetensors"):  # written for their owner alone
            path.chmod((folder / "config.json").stat().st_mode)


def mixed(config: PreTrainedConfig, kept: Sequence[int]) -> bool:
    """Whether these layers are of several kinds: sliding and full attention, say."""
    listed = (getattr(config, name, None) for name in PER_LAYER)
    return any(len({values[layer] for layer in kept}) > 1 for values in listed if values)


@torch.no_grad()
def largest_difference(folder: Path, routed: RoutedLM, kept: Sequence[int], ids: Tensor) -> float:
    """Largest distance between logits of the checkpoint, as stock transformers loads it, and of the engine.

    Both compute in float32; the backbone stays in it. The engine runs the plan for every token, sinks included.

    Args:
        folder: of the checkpoint.
        routed: the whole model, with any router.
        kept: the layers of the plan.
        ids: (B, T) long, a text.

    Raises:
        RunError: they are further apart than rounding explains.
    """
    backbone = routed.backbone
    backbone.model.float()
    routed.router.float()
    runs = torch.zeros(*ids.shape, routed.geometry.layers, dtype=torch.bool, device=ids.device)
    runs[..., list(kept)] = True
    with routed.changed(sink_tokens=0):
        ours = routed(ids, runs=runs).logits
    attention = ATTENTION.get(backbone.model.config.model_type, "sdpa")
    with quiet_transformers():
        small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    theirs = small.eval().to(ids.device)(ids, use_cache=False).logits
    found = (ours - theirs).abs().max().item()
    if not found <= CLOSE * max(1.0, ours.abs().max().item()):
        raise RunError(
            f"The checkpoint's logits are {found:.3g} from the engine's, which is more than rounding; nothing was "
            f"written. Report it, with the backbone {backbone.name} and the layers {list(kept)}."
        )
    return found
