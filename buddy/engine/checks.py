"""What a forward of the parallel form cannot do, said before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from buddy.errors import BuddyError
from buddy.router import LayerwiseRouter

if TYPE_CHECKING:
    from buddy.engine.model import RoutedLM


def check_forward(routed: RoutedLM, compute_all_layers: bool, gated: bool, gate_weighted: bool) -> None:
    """Refuse what a forward cannot do with this policy, router or model.

    Args:
        routed: the model.
        compute_all_layers: each layer is computed on every token.
        gated: gates are given, for straight-through training.
        gate_weighted: layers are weighed by a layerwise router's gates.

    Raises:
        BuddyError: with what to choose instead.
    """
    if compute_all_layers and routed.policy.name != "fill":
        raise BuddyError(
            f"Computing every layer, and so the straight-through estimator, needs the policy 'fill', not "
            f"{routed.policy.name!r}; choose that, or the perturbed estimator."
        )
    if gate_weighted and not isinstance(routed.router, LayerwiseRouter):
        raise BuddyError(f"{type(routed.router).__name__} has no gates to weigh layers by; a LayerwiseRouter has.")
    model = routed.backbone.model
    checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in routed.backbone.layers)
    healed = routed.adapter is not None and torch.is_grad_enabled()
    if (gate_weighted or gated or healed) and model.training and checkpointing:
        what, otherwise = ("Plans", "") if healed else ("Gates", ", or train with perturbed plans")
        raise BuddyError(f"{what} do not go through gradient checkpointing; turn it off{otherwise}.")
