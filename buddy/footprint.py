"""`buddy memory`: memory for training and serving on each device, from a model's shape."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from buddy.backbone import embedded
from buddy.backbone.embedded import quiet_transformers
from buddy.backbone.load import DTYPES, check_routable
from buddy.budget import executed_layers
from buddy.config import ObjectiveSection, Recipe
from buddy.console import results
from buddy.errors import BackboneError, BudgetError, DataError, RegistryError, nearest, reason
from buddy.io import check_output_path, write_json
from buddy.registry import build
from buddy.router import AnyRouter, Geometry, LayerwiseRouter

GIB = 2**30
CONTEXT = 1000  # tokens of a row whose cache is shown
POLICIES = ("fill", "hole")
NOTE = (
    "The step, and what fsdp gathers, are estimates; the rest is counted. What the driver and the allocator keep for "
    "themselves comes on top. Healing, which goes backward through the layers, takes more than is said here."
)


@dataclass(frozen=True)
class Training:
    """Bytes on each device while a router is trained."""

    weights: int
    router_and_optimizer: int
    step: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.router_and_optimizer + self.step


@dataclass(frozen=True)
class Serving:
    """Bytes on the one device that serves; `cache` has, by budget, those of 1 000 tokens of a row by policy."""

    weights: int
    router: int
    cache: dict[str, dict[str, int]]
    executed: dict[str, int]


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
        budgets: whose cache is shown, instead of the default recipe's.
        window: tokens in a training window.
        batch_size: windows a step over all devices.
        dtype: of weights and cache.
        strategy: "auto", each device with all weights, or "fsdp", each with its part.
        router: an installed name.
        json_file: where the numbers go as JSON, if anywhere.

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
    shape, made = _described(backbone, dtype, window, router)
    training = _training(shape, made, devices, window, batch_size // devices, strategy)
    serving = _serving(shape, made, budgets)
    what = f"{backbone}: {shape.layers} layers, {_count(shape.parameters)} parameters, {dtype}"
    spread = f"{devices} devices, {strategy}" if devices > 1 else "one device"
    how = f"{spread}, {batch_size} window{'s' * (batch_size > 1)} of {window} tokens a step"
    _show(what, how, training, serving)
    if json_file:
        write_json(json_file, as_json(shape, training, serving))
        results.print(f"JSON: {json_file}", soft_wrap=True)


def _described(backbone: str, dtype: str, window: int, router: str) -> tuple[Shape, AnyRouter]:
    """The model's sizes and the router for it, both as far as they can be planned with."""
    model = hollow_model(backbone, dtype)
    if window > model.config.max_position_embeddings:
        raise DataError(
            f"--window is {window}, but {backbone} reads at most {model.config.max_position_embeddings} tokens; set "
            "that or less."
        )
    shape = shape_of(model)
    made = build(router, geometry_of(shape), {})
    if isinstance(made, LayerwiseRouter):
        raise RegistryError(
            f"The router {router!r} is trained by gradients through the layers, whose memory is not estimated here; "
            "plan with another router."
        )
    return shape, made


def as_json(shape: Shape, training: Training, serving: Serving) -> dict[str, Any]:
    """All numbers in bytes."""
    return {
        "parameters": shape.parameters,
        "layers": shape.layers,
        "training": asdict(training) | {"total": training.total},
        "serving": asdict(serving),
    }


def _training(shape: Shape, router: AnyRouter, devices: int, window: int, rows: int, strategy: str) -> Training:
    step = 0
    if router.trainable:
        step = step_bytes(shape, router.geometry, rows, window, ObjectiveSection().plans)
    return Training(weight_bytes(shape, devices, strategy), router_bytes(router, training=True, devices=devices), step)


def _serving(shape: Shape, router: AnyRouter, budgets: Sequence[str] | None) -> Serving:
    asked = [f"{budget:g}" for budget in Recipe().budgets] if budgets is None else budgets
    executed = {}
    for budget in asked:
        executed[budget] = executed_layers(budget, shape.layers, router.geometry.always_on)
        if router.full_depth and executed[budget] < shape.layers:
            if budgets is not None:
                raise BudgetError(f"This router runs every layer; ask for budget 1.0 instead of {budget}.")
            del executed[budget]
    cache = {
        budget: {policy: cache_bytes(shape, CONTEXT, policy, count) for policy in POLICIES}
        for budget, count in executed.items()
    }
    return Serving(shape.weight_bytes, router_bytes(router, training=False), cache, executed)


def _show(what: str, how: str, training: Training, serving: Serving) -> None:
    lines = {
        "weights, frozen": training.weights,
        "router and optimizer": training.router_and_optimizer,
        "a step, at most": training.step,
        "together": training.total,
    }
    _print(what)
    _print(f"Training a router, each device ({how}):", _table(("", "GiB"), [(k, _gib(v)) for k, v in lines.items()]))
    rows = [
        (budget, str(serving.executed[budget]), *(_gib(held[policy]) for policy in POLICIES))
        for budget, held in serving.cache.items()
    ]
    _print(
        f"Serving, one device: weights {_gib(serving.weights)} GiB, router {_gib(serving.router)} GiB, and for each "
        f"{CONTEXT} tokens of a row a cache by budget and routing.policy:",
        _table(("budget", "layers", *(f"{policy}, GiB" for policy in POLICIES)), rows),
    )
    _print(NOTE)


def _print(text: str, *below: Table | str) -> None:
    results.print(text, soft_wrap=True)
    for each in below:
        results.print(each)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table()
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _gib(value: int) -> str:
    """Three figures, and as many places as they need."""
    gib = value / GIB
    return f"{gib:.1f}" if gib >= 100 else f"{gib:.2f}" if gib >= 1 else f"{gib:.4f}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


FLOAT32 = 4
SLOT, VALID = 8, 1  # bytes that a stored position takes beside K and V under `hole`: its number, and who ran it
UNREAD = 17  # positions of a window without a scored prediction: a prefix too short to learn from, and the last one
CHUNK = 512  # tokens whose logits are looked at together on an accelerator
GATHERED = 2  # layers that lie whole on a device under fsdp: the one that runs and the one that is fetched


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
        windows: for each layer the positions that a later one can still see; None for all.
        capped: whether logits are squashed, which takes copies of them.
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

    @property
    def layers(self) -> int:
        """L."""
        return len(self.layer_bytes)

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return sum(self.layer_bytes) + self.rest_bytes


def shape_of(model: PreTrainedModel) -> Shape:
    """The shape of a model, whether or not it has its weights."""
    config, layers = model.config, model.model.layers
    attention = layers[0].self_attn
    kinds = getattr(config, "layer_types", None)
    sliding = getattr(config, "sliding_window", None)
    kinds = kinds or ["sliding_attention" if sliding else "full_attention"] * len(layers)
    own = tuple(_bytes(layer) for layer in layers)
    return Shape(
        layer_bytes=own,
        rest_bytes=_bytes(model) - sum(own),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        element=model.dtype.itemsize,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        query=config.num_attention_heads * attention.head_dim,
        kv=config.num_key_value_heads * attention.head_dim,
        windows=tuple(sliding if kind == "sliding_attention" else None for kind in kinds[: len(layers)]),
        capped=bool(getattr(config, "final_logit_softcapping", None)),
    )


def geometry_of(shape: Shape, context_layer: int = 1) -> Geometry:
    """The sizes that a router needs, where it pools values."""
    return Geometry(layers=shape.layers, context_layer=context_layer, hidden=shape.hidden, features=shape.kv)


def weight_bytes(shape: Shape, devices: int, strategy: str) -> int:
    """Of the frozen backbone on each device while training.

    With "auto" each device has all of it. With "fsdp" it has its part, and beside it whole what is not in a layer,
    and the layers that run and come next.
    """
    if strategy == "auto" or devices == 1:
        return shape.weight_bytes
    largest = sorted(shape.layer_bytes)[-GATHERED:]
    return -(-shape.weight_bytes // devices) + shape.rest_bytes + sum(largest)


def router_bytes(router: AnyRouter, *, training: bool, devices: int = 1) -> int:
    """Of a router in float32; in training with the copy it started from, its gradients and AdamW's two moments.

    Processes that train together keep a second copy of the gradients to exchange.
    """
    held = sum(tensor.nbytes for tensor in (*router.parameters(), *router.buffers()))
    if not training or not router.trainable:
        return held
    trained = sum(parameter.nbytes for parameter in router.parameters() if parameter.requires_grad)
    return 2 * held + trained * (3 + (devices > 1))


def cache_bytes(shape: Shape, tokens: int, policy: str, executed: int, sinks: int = 0) -> int:
    """Of the keys and values of one row.

    Under "fill" and "zero" every layer holds every position (a sliding layer its last ones), whatever the budget; the
    engine may be late with some and never has more. Under "hole" a token is in the layers that it ran alone, so that
    where no layer slides the number is exact whatever the plans were; elsewhere it is the mean over plans.

    Args:
        shape: of the model.
        tokens: positions that went by.
        policy: "fill", "hole" or "zero".
        executed: K.
        sinks: first tokens in all layers.
    """
    held = [tokens if window is None else min(tokens, window - 1) for window in shape.windows]
    each = 2 * shape.kv * shape.element
    if policy != "hole":
        return sum(held) * each
    routed = sum(max(positions - sinks, 0) for positions in held) * executed / shape.layers
    return round((routed + shape.layers * min(sinks, tokens)) * (each + SLOT + VALID))


def step_bytes(shape: Shape, geometry: Geometry, rows: int, window: int, plans: int, chunk: int = CHUNK) -> int:
    """Most that a training step holds at once beside weights and router: perturbed plans, KL to the dense model.

    The backbone has no gradients, so nothing of its layers is kept: the states of one layer at a time, the dense
    model's distribution in float32 (twice: of all rows, and of those below full depth), the logits of all plans, and
    what the router learns from. An estimate.

    Args:
        shape: of the model.
        geometry: of the router.
        rows: windows of this device.
        window: tokens in each.
        plans: tried for each window.
        chunk: tokens whose logits are looked at together.
    """
    tokens, scored = rows * window, rows * max(window - UNREAD, 1)
    context = 3 * FLOAT32 * tokens * (2 * geometry.features + geometry.hidden)
    distribution = FLOAT32 * scored * shape.vocabulary
    logits = shape.element * scored * shape.vocabulary
    dense = logits + distribution * (1 if shape.element == FLOAT32 else 2)
    trying = logits * plans * (3 if shape.capped else 1)
    looking = 3 * FLOAT32 * min(chunk, scored) * shape.vocabulary
    layer = _running_bytes(shape, tokens * plans, window)
    return context + max(dense, 2 * distribution + max(layer, trying + (0 if shape.capped else looking)))


def _running_bytes(shape: Shape, tokens: int, window: int) -> int:
    """What one layer holds while it runs on so many tokens, in windows of so many."""
    mlp = 3 * shape.intermediate + 8 * shape.hidden
    attention = 4 * shape.query + 4 * shape.kv + 4 * shape.hidden
    return tokens * (shape.element * max(mlp, attention) + window)


def _bytes(module: nn.Module) -> int:
    """Of the parameters; what is shared counts once."""
    return sum(parameter.nbytes for parameter in module.parameters())


CHOICES = f"a folder with config.json, such a file, owner/name on the hub, or {embedded.NAME!r}"


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
    if name in embedded.NAMES:
        path = str(embedded.smollm2_folder())
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
        raise BackboneError(f"No model is named {name!r}{nearest(name, embedded.NAMES) or f'; give {CHOICES}.'}")
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise BackboneError(f"No model {name!r} was found ({reason(error)}); give {CHOICES}.") from error
    return values


def _damaged(name: str, error: Exception) -> BackboneError:
    return BackboneError(f"The configuration of {name!r} cannot be used ({reason(error)}); mend it, or name another.")
