"""`buddy memory`: bytes for training and serving on each device, from a model's configuration alone.

What accelerate's estimator does not know: caches under a cache policy, and a training step that tries several plans.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from buddy.backbone import embedded
from buddy.backbone.embedded import quiet_transformers
from buddy.backbone.load import DTYPES, check_routable, locate, read_config
from buddy.budget import executed_layers
from buddy.console import counted, results
from buddy.errors import BackboneError, BudgetError, DataError, RegistryError, reason
from buddy.io import check_output_path, write_json
from buddy.registry import build
from buddy.router import AnyRouter, Geometry, LayerwiseRouter
from buddy.schema import ObjectiveSection, Recipe

GIB = 2**30
FLOAT32 = 4
SLOT, VALID = 8, 1  # bytes of a stored position beside K and V under `hole`: its index, and whether the token ran here
UNSCORED = 17  # positions of a window without a loss: a prefix too short to learn from, and the last one
CHUNK = 512  # tokens whose logits an accelerator evaluates together
GATHERED = 2  # layers that are whole on a device under fsdp: the one that runs and the one that is fetched
CONTEXT = 1000  # tokens of a row whose cache is printed
POLICIES = ("fill", "hole")
NOTE = (
    "The step, and what fsdp gathers, are estimates; the rest is counted. What the driver and the allocator keep for "
    "themselves comes on top. Healing, which goes backward through the layers, takes more than is said here."
)


def print_memory(
    backbone: str,
    *,
    devices: int = 1,
    budgets: Sequence[str] | None = None,
    window: int = 256,
    batch_size: int = 4,
    dtype: str = "bfloat16",
    strategy: str = "auto",
    router: str = "buddy",
    json_file: Path | None = None,
) -> None:
    """Print what training and serving take; no weight is loaded.

    Args:
        backbone: a name, a folder, or a config.json.
        devices: to train on.
        budgets: of the caches, instead of the default recipe's.
        window: tokens in a training window.
        batch_size: windows a step over all devices.
        dtype: of weights and cache.
        strategy: "auto", each device with all weights, or "fsdp", each with its shard.
        router: an installed name.
        json_file: where the numbers go as JSON.

    Raises:
        BuddyError: the configuration, the router, a budget or the batch cannot be used.
    """
    if json_file:
        check_output_path(json_file)
    if batch_size % devices:
        raise DataError(
            f"A batch of {batch_size} windows cannot be shared by {devices} devices; set --batch-size to a multiple of "
            f"{devices}."
        )
    model = empty_model(backbone, dtype)
    longest = model.config.max_position_embeddings
    if window > longest:
        raise DataError(f"--window is {window}, but {backbone} reads at most {longest} tokens; set that or less.")
    shape = Shape.of(model)
    module = build(router, shape.geometry(), {})
    if isinstance(module, LayerwiseRouter):
        raise RegistryError(
            f"The router {router!r} is trained by gradients through the layers, whose memory is not estimated here; "
            "name another router."
        )
    rows, plans = batch_size // devices, ObjectiveSection().plans
    training = {
        "weights": weight_bytes(shape, devices, strategy),
        "router_and_optimizer": router_bytes(module, training=True, devices=devices),
        "step": step_bytes(shape, module.geometry, rows, window, plans) if module.trainable else 0,
    }
    training["total"] = sum(training.values())
    executed = _executed(shape, module, budgets)
    serving = {
        "weights": shape.weight_bytes,
        "router": router_bytes(module, training=False),
        "cache": {
            budget: {policy: cache_bytes(shape, CONTEXT, policy, count) for policy in POLICIES}
            for budget, count in executed.items()
        },
        "executed": executed,
    }
    spread = f"{devices} devices, {strategy}" if devices > 1 else "one device"
    batch = f"{spread}, {counted(batch_size, 'window')} of {window} tokens a step"
    _print(f"{backbone}: {shape.layers} layers, {_parameters(shape.parameters)} parameters, {dtype}", batch, training)
    _print_serving(serving)
    if json_file:
        write_json(
            json_file,
            {"parameters": shape.parameters, "layers": shape.layers, "training": training, "serving": serving},
        )
        results.print(f"JSON: {json_file}", soft_wrap=True)


def empty_model(name: str, dtype: str) -> PreTrainedModel:
    """The model that a configuration describes, on torch's meta device: all sizes and no data.

    Args:
        name: of a backbone, as in a recipe; or a folder with config.json, or that file.
        dtype: float32, bfloat16 or float16.

    Raises:
        BackboneError: there is no configuration, it is damaged, or Buddy cannot route such a model.
    """
    path = os.path.expanduser(name)
    values = read_config(name, path if os.path.exists(path) and name not in embedded.NAMES else locate(name))
    check_routable(name, values)
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.for_model(**values)
            return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False).eval()
    except Exception as error:  # impossible sizes raise a dozen kinds of error
        raise BackboneError(
            f"The configuration of {name!r} cannot be used ({reason(error)}); correct it, or name another model."
        ) from error


@dataclass(frozen=True)
class Shape:
    """What memory depends on.

    Attributes:
        layer_bytes: of the weights of each layer.
        rest_bytes: of the embeddings, the last norm, and the head where it has weights of its own.
        parameters: of the whole model.
        element: bytes of a number in weights, states and cache.
        hidden, intermediate, vocabulary: widths D, I and V.
        query: width of all heads' queries.
        kv: width of a token's keys (or values) in one layer.
        windows: for each layer the positions that a later one can still attend to; None for all.
        capped: whether logits are soft-capped, which takes copies of them.
    """

    layer_bytes: tuple[int, ...]
    rest_bytes: int
    parameters: int
    element: int
    hidden: int
    intermediate: int
    vocabulary: int
    query: int
    kv: int
    windows: tuple[int | None, ...]
    capped: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """The shape of a model, with or without its weights."""
        config, layers = model.config, model.model.layers
        sliding = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        kinds = kinds or ["sliding_attention" if sliding else "full_attention"] * len(layers)
        layer_bytes = tuple(_bytes(layer) for layer in layers)
        return cls(
            layer_bytes=layer_bytes,
            rest_bytes=_bytes(model) - sum(layer_bytes),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            element=model.dtype.itemsize,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            query=config.num_attention_heads * layers[0].self_attn.head_dim,
            kv=config.num_key_value_heads * layers[0].self_attn.head_dim,
            windows=tuple(sliding if kind == "sliding_attention" else None for kind in kinds[: len(layers)]),
            capped=bool(getattr(config, "final_logit_softcapping", None)),
        )

    @property
    def layers(self) -> int:
        """L."""
        return len(self.layer_bytes)

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return sum(self.layer_bytes) + self.rest_bytes

    def geometry(self) -> Geometry:
        """The sizes that a router needs, where it pools values after one context layer."""
        return Geometry(layers=self.layers, context_layer=1, hidden=self.hidden, features=self.kv)


def weight_bytes(shape: Shape, devices: int, strategy: str) -> int:
    """Of the frozen backbone on each device while training.

    With "auto" each device has all of it. With "fsdp" it has its shard, and whole what is not in a layer, the layer
    that runs and the next one.
    """
    if strategy == "auto" or devices == 1:
        return shape.weight_bytes
    return -(-shape.weight_bytes // devices) + shape.rest_bytes + sum(sorted(shape.layer_bytes)[-GATHERED:])


def router_bytes(router: AnyRouter, *, training: bool, devices: int = 1) -> int:
    """Of a router in float32; in training with the copy of its start, its gradients and AdamW's two moments.

    Processes that train together have a second copy of the gradients, for the exchange.
    """
    total = sum(tensor.nbytes for tensor in (*router.parameters(), *router.buffers()))
    if not training or not router.trainable:
        return total
    trained = sum(parameter.nbytes for parameter in router.parameters() if parameter.requires_grad)
    return 2 * total + trained * (3 + (devices > 1))


def cache_bytes(shape: Shape, tokens: int, policy: str, executed: int, sinks: int = 0) -> int:
    """Of the keys and values of one row.

    Under "fill" and "zero" every layer has every position (a sliding layer its last ones), at every budget. Under
    "hole" a token is only in the layers that it ran: where no layer slides the number is exact for all plans;
    elsewhere it is the mean over plans.

    Args:
        shape: of the model.
        tokens: positions so far.
        policy: "fill", "hole" or "zero".
        executed: K.
        sinks: first tokens, in all layers.
    """
    positions = [tokens if window is None else min(tokens, window - 1) for window in shape.windows]
    each = 2 * shape.kv * shape.element
    if policy != "hole":
        return sum(positions) * each
    routed = sum(max(count - sinks, 0) for count in positions) * executed / shape.layers
    return round((routed + shape.layers * min(sinks, tokens)) * (each + SLOT + VALID))


def step_bytes(shape: Shape, geometry: Geometry, rows: int, window: int, plans: int, chunk: int = CHUNK) -> int:
    """An estimate of the most that a training step takes beside weights and router: perturbed plans, KL to the dense.

    The backbone has no gradients, so its layers keep nothing: the states of one layer at a time, the dense model's
    distribution in float32 (twice: of all rows, and of those below full depth), the logits of all plans, and what the
    router learns from.

    Args:
        shape: of the model.
        geometry: of the router.
        rows: windows of this device.
        window: tokens in each.
        plans: tried for each window.
        chunk: tokens whose logits are evaluated together.
    """
    tokens, scored = rows * window, rows * max(window - UNSCORED, 1)
    context = 3 * FLOAT32 * tokens * (2 * geometry.features + geometry.hidden)
    distribution = FLOAT32 * scored * shape.vocabulary
    logits = shape.element * scored * shape.vocabulary
    dense = logits + distribution * (1 if shape.element == FLOAT32 else 2)
    plan_logits = logits * plans * (3 if shape.capped else 1)
    evaluated = 0 if shape.capped else 3 * FLOAT32 * min(chunk, scored) * shape.vocabulary
    mlp = 3 * shape.intermediate + 8 * shape.hidden
    attention = 4 * shape.query + 4 * shape.kv + 4 * shape.hidden
    layer = tokens * plans * (shape.element * max(mlp, attention) + window)
    return context + max(dense, 2 * distribution + max(layer, plan_logits + evaluated))


def _executed(shape: Shape, router: AnyRouter, budgets: Sequence[str] | None) -> dict[str, int]:
    """K by budget; the default budgets that the router cannot serve are left out."""
    found = {}
    for budget in [f"{budget:g}" for budget in Recipe().budgets] if budgets is None else budgets:
        count = executed_layers(budget, shape.layers, router.geometry.always_on)
        if not router.full_depth or count == shape.layers:
            found[budget] = count
        elif budgets is not None:
            raise BudgetError(f"This router runs every layer; ask for budget 1.0 instead of {budget}.")
    return found


def _print(model: str, batch: str, training: dict[str, int]) -> None:
    labels = ("weights, frozen", "router and optimizer", "a step, at most", "together")
    results.print(model, soft_wrap=True)
    results.print(f"Training a router, each device ({batch}):", soft_wrap=True)
    rows = [(label, _gib(value)) for label, value in zip(labels, training.values(), strict=True)]
    results.print(_table(("", "GiB"), rows))


def _print_serving(serving: dict[str, Any]) -> None:
    results.print(
        f"Serving, one device: weights {_gib(serving['weights'])} GiB, router {_gib(serving['router'])} GiB, and for "
        f"each {CONTEXT} tokens of a row a cache by budget and routing.policy:",
        soft_wrap=True,
    )
    rows = [
        (budget, str(serving["executed"][budget]), *(_gib(size) for size in sizes.values()))
        for budget, sizes in serving["cache"].items()
    ]
    results.print(_table(("budget", "layers", *(f"{policy}, GiB" for policy in POLICIES)), rows))
    results.print(NOTE, soft_wrap=True)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right" if table.columns else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _gib(value: int) -> str:
    """At least three significant digits."""
    gib = value / GIB
    return f"{gib:.1f}" if gib >= 100 else f"{gib:.2f}" if gib >= 1 else f"{gib:.4f}"


def _parameters(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _bytes(module: nn.Module) -> int:
    """Of the parameters; shared ones count once."""
    return sum(parameter.nbytes for parameter in module.parameters())
