"""`buddy plan`: memory for each device, as a table and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from buddy.budget import executed_layers
from buddy.config import ObjectiveSection, Recipe
from buddy.console import results
from buddy.errors import BudgetError, DataError, RegistryError
from buddy.footprint import Shape, cache_bytes, geometry_of, router_bytes, shape_of, step_bytes, weight_bytes
from buddy.footprint.config import hollow_model
from buddy.io import check_output_path, write_json
from buddy.registry import build
from buddy.router import AnyRouter, LayerwiseRouter

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


def plan_memory(
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
