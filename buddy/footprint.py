"""`buddy memory`: the bytes that training and serving take on each device, from a configuration alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from buddy.backbone.embedded import quiet_transformers
from buddy.backbone.load import DTYPES, Backbone, check_routable, locate, read_config
from buddy.console import counted, print_titled_table, report_json, stdout
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import BackboneError, DataError, RegistryError, reason
from buddy.io import check_output_path
from buddy.registry import build
from buddy.router import AnyRouter, Geometry, LayerwiseRouter, available_budgets
from buddy.schema import ObjectiveSection, Recipe

GIB = 2**30
FLOAT32 = 4
SLOT, VALID = 8, 1  # bytes of a stored position beside K and V under `hole`: its index, and whether the token ran here
UNSCORED = 17  # positions of a window without a loss: a prefix too short to learn from, and the last one
CHUNK = 512  # tokens whose logits an accelerator evaluates together
GATHERED = 2  # layers that are whole on a device under fsdp: the one that runs and the one that is fetched
CONTEXT = 1000  # tokens of a row whose cache is printed
POLICIES = ("fill", "hole")
LABELS = ("weights, frozen", "router and optimizer", "a step, at most", "together")  # of the training table
NOTE = (
    "The step, and what fsdp gathers, are estimates; the rest is counted. The driver and the allocator take more. "
    "Training an adapter or bridges, or a router by another estimator than perturbed, computes gradients through the "
    "layers and takes more than this. Bridges, about 2 % of the layers' weights, are not counted."
)


def print_memory(
    backbone: str,
    *,
    devices: int,
    budgets: Sequence[str] | None,
    window: int,
    batch_size: int,
    dtype: str,
    strategy: str,
    router: str,
    json_file: Path | None,
) -> None:
    """Print what training and serving take; no weight is loaded.

    Args:
        backbone: a name, a folder, or a config.json.
        devices: to train on.
        budgets: of the caches, instead of the default recipe's.
        window: tokens in a training window.
        batch_size: windows per step over all devices.
        dtype: of weights and cache.
        strategy: "auto", each device with all weights, or "fsdp", each with its shard.
        router: an installed name.
        json_file: where the numbers go as JSON.

    Raises:
        BuddyError: the configuration, the router, a budget or the batch cannot be used.
    """
    if json_file:
        check_output_path(json_file, backbone)
    if batch_size % devices:
        raise DataError(
            f"A batch of {batch_size} windows cannot be shared by {devices} devices; set --batch-size to a multiple of "
            f"{devices}."
        )
    model = empty_backbone(backbone, dtype)
    if window > model.context_length:
        raise DataError(
            f"--window is {window}, but {backbone} reads at most {model.context_length} tokens; set that or less."
        )
    routed = RoutedLM(model, build(router, geometry_of(model), {}))
    if isinstance(routed.router, LayerwiseRouter):
        raise RegistryError(
            f"The router {router!r} is trained by gradients through the layers, whose memory is not estimated here; "
            "name another router."
        )
    default = [f"{budget:g}" for budget in available_budgets(routed.router, Recipe().budgets)]
    executed = {budget: routed.executed_layers(budget) for budget in budgets or default}
    found = _estimate(routed, executed, devices, batch_size // devices, window, strategy)
    report_json(json_file, found)
    training, serving = found["training"], found["serving"]
    millions = f"{found['parameters'] / 1e6:,.1f} million parameters"
    stdout.print(f"{backbone}: {model.num_layers} layers, {millions}, {dtype}")
    batch = f"{counted(devices, 'device')}, {strategy}, {counted(batch_size, 'window')} of {window} tokens per step"
    sizes = [(label, _gib(size)) for label, size in zip(LABELS, training.values(), strict=True)]
    print_titled_table(f"Training a router, each device ({batch})", ("", "GiB"), sizes)
    print_titled_table(
        f"Serving, one device: weights {_gib(serving['weights'])} GiB, router {_gib(serving['router'])} GiB, and the "
        f"cache of {CONTEXT} tokens of a row, by budget and routing.policy",
        ("budget", "layers", *(f"{policy}, GiB" for policy in POLICIES)),
        [(budget, str(executed[budget]), *map(_gib, of.values())) for budget, of in serving["cache"].items()],
        NOTE,
    )


def _estimate(
    routed: RoutedLM, executed: Mapping[str, int], devices: int, rows: int, window: int, strategy: str
) -> dict[str, Any]:
    """All numbers, in bytes, as `--json` writes them; `rows` windows of a step are on each device."""
    backbone, router = routed.backbone, routed.router
    step = step_bytes(backbone, router.geometry, rows, window, ObjectiveSection().plans)
    training = {
        "weights": weight_bytes(backbone, devices, strategy),
        "router_and_optimizer": router_bytes(router, training=True, devices=devices),
        "step": step if router.trainable else 0,
    }
    cache = {
        budget: {policy: cache_bytes(backbone, CONTEXT, policy, count) for policy in POLICIES}
        for budget, count in executed.items()
    }
    return {
        "parameters": sum(parameter.numel() for parameter in backbone.model.parameters()),
        "layers": backbone.num_layers,
        "training": training | {"total": sum(training.values())},
        "serving": {
            "weights": _bytes(backbone.model),
            "router": router_bytes(router, training=False),
            "cache": cache,
            "executed": dict(executed),
        },
    }


def empty_backbone(name: str, dtype: str) -> Backbone:
    """The model that a configuration describes, on torch's meta device: all sizes and no data; it has no tokenizer.

    Args:
        name: of a backbone, as in a recipe; or a folder with config.json, or that file.
        dtype: float32, bfloat16 or float16.

    Raises:
        BackboneError: there is no configuration, it is damaged, or Buddy cannot route such a model.
    """
    path = os.path.expanduser(name)
    values = read_config(name, path if os.path.exists(path) else locate(name))
    check_routable(name, values)
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.for_model(**values)
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False).eval()
    except Exception as error:  # impossible sizes raise a dozen kinds of error
        raise BackboneError(
            f"The configuration of {name!r} cannot be used ({reason(error)}); correct it, or name another."
        ) from error
    return Backbone(name, model, cast(Any, None), fingerprint="")


def weight_bytes(backbone: Backbone, devices: int, strategy: str) -> int:
    """Of the frozen backbone on each device while training.

    With "auto" each device has all of it. With "fsdp" it has its shard of the layers, all weights outside them,
    and two whole layers: the one that runs and the next one.
    """
    total = _bytes(backbone.model)
    if strategy == "auto" or devices == 1:
        return total
    layers = [_bytes(layer) for layer in backbone.layers]
    return -(-sum(layers) // devices) + total - sum(layers) + sum(sorted(layers)[-GATHERED:])


def router_bytes(router: AnyRouter, *, training: bool, devices: int = 1) -> int:
    """Of a router in float32; in training with the copy of its start, its gradients and AdamW's two moments.

    Processes that train together have a second copy of the gradients, for the exchange.
    """
    total = sum(tensor.nbytes for tensor in (*router.parameters(), *router.buffers()))
    if not training or not router.trainable:
        return total
    trained = sum(parameter.nbytes for parameter in router.parameters() if parameter.requires_grad)
    return 2 * total + trained * (3 + (devices > 1))


def cache_bytes(backbone: Backbone, tokens: int, policy: str, executed: int) -> int:
    """Of the keys and values of one row.

    Under "fill" and "zero" every layer has every position (a sliding layer its last ones), at every budget. Under
    "hole" a token is only in the layers that it ran: where no layer slides the number is exact for all plans, but for
    sinks, which every layer has; elsewhere it is the mean over plans.

    Args:
        backbone: the model.
        tokens: positions so far.
        policy: "fill", "hole" or "zero".
        executed: K.
    """
    stock = DynamicCache(config=backbone.model.config).layers
    positions = sum(min(tokens, layer.sliding_window - 1) if layer.is_sliding else tokens for layer in stock)
    each = 2 * backbone.kv_size * backbone.dtype.itemsize
    if policy != "hole":
        return positions * each
    return round(positions * executed / backbone.num_layers * (each + SLOT + VALID))


def step_bytes(backbone: Backbone, geometry: Geometry, rows: int, window: int, plans: int) -> int:
    """An estimate of the most that a training step takes beside weights and router: perturbed plans, KL to the dense.

    The backbone has no gradients, so its layers keep nothing: the states of one layer at a time, the dense model's
    distribution in float32, the logits of all plans, and what the router learns from.

    Args:
        backbone: the model.
        geometry: of the router.
        rows: windows of this device.
        window: tokens in each.
        plans: tried for each window.
    """
    config, element = backbone.model.config, backbone.dtype.itemsize
    capped = bool(getattr(config, "final_logit_softcapping", None))  # capping copies the logits
    query = config.num_attention_heads * backbone.layers[0].self_attn.head_dim
    tokens, scored = rows * window, rows * max(window - UNSCORED, 1)
    context = 3 * FLOAT32 * tokens * (2 * geometry.features + geometry.hidden)
    distribution = FLOAT32 * scored * config.vocab_size
    logits = element * scored * config.vocab_size
    dense = logits + distribution * (1 if element == FLOAT32 else 2)
    plan_logits = logits * plans * (3 if capped else 1)
    evaluated = 0 if capped else 3 * FLOAT32 * min(CHUNK, scored) * config.vocab_size
    mlp = 3 * config.intermediate_size + 8 * config.hidden_size
    attention = 4 * (query + backbone.kv_size + config.hidden_size)
    layer = tokens * plans * (element * max(mlp, attention) + window)
    return context + max(dense, distribution + max(layer, plan_logits + evaluated))


def _gib(size: int) -> str:
    """At least three significant digits."""
    gib = size / GIB
    return f"{gib:.1f}" if gib >= 100 else f"{gib:.2f}" if gib >= 1 else f"{gib:.4f}"


def _bytes(module: nn.Module) -> int:
    """Of the parameters; shared ones count once."""
    return sum(parameter.nbytes for parameter in module.parameters())
