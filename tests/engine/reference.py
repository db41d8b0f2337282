"""The mathematics of routing, recomputed by brute force: no cache, every layer on every token, chosen afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from buddy import Context, Geometry, LayerwiseRouter, Router
from buddy.engine.bridges import Bridges
from buddy.engine.model import RoutedLM, geometry_of
from buddy.engine.record import Record
from tests.tiny import tiny_backbone


class _Zeroing(DynamicCache):
    """Zeros in place of the K/V of tokens that skip a layer."""

    def __init__(self, config, runs: Tensor) -> None:
        super().__init__(config=config)
        self.runs = runs

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        kept = self.runs[:, None, :, layer_idx, None]
        return super().update(key_states * kept, value_states * kept, layer_idx, *args, **kwargs)


def _without_holes(mask: Tensor | None, runs: Tensor, eager: bool) -> Tensor:
    """The mask (B, 1, T, T) that hides keys of tokens that did not run; each token sees itself."""
    batch, length = runs.shape
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    itself = torch.eye(length, dtype=torch.bool)
    if not eager:
        return mask & (runs[:, None, None] | itself)
    return mask.masked_fill(~(runs[:, None, None] | itself), torch.finfo(mask.dtype).min)


@torch.no_grad()
def reference_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    runs: Tensor,
    mask: Tensor | None = None,
    policy: str = "fill",
    bridges: Bridges | None = None,
) -> Tensor:
    """Logits (B, T, V) of a stock model under plan `runs` (B, T, L): h ← m · F(h) + (1 − m) · bridge(h)."""
    eager = model.config._attn_implementation == "eager"

    def choose(index: int):
        def hook(_, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            return torch.where(runs[..., index, None], output, bridged(bridges, index, hidden))

        return hook

    def punch(index: int):
        def hook(_, args, kwargs):
            held = _without_holes(kwargs.get("attention_mask"), runs[..., index], eager)
            return args, {**kwargs, "attention_mask": held}

        return hook

    hooks = [layer.register_forward_hook(choose(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)]
    if policy == "hole":
        hooks += [
            layer.register_forward_pre_hook(punch(i), with_kwargs=True) for i, layer in enumerate(model.model.layers)
        ]
    try:
        positions = None if mask is None else (mask.long().cumsum(1) - 1).clamp(min=0)
        cache = _Zeroing(model.config, runs) if policy == "zero" else None
        inputs = {"attention_mask": mask, "position_ids": positions, "cache": cache, "use_cache": cache is not None}
        return model(input_ids, **inputs).logits
    finally:
        for hook in hooks:
            hook.remove()


def bridged(bridges: Bridges | None, layer: int, hidden: Tensor) -> Tensor:
    """The state after a skipped layer: h + U · V · LN(h) + b, by its definition."""
    if bridges is None or not bridges.fitted[layer]:
        return hidden
    centred = hidden - hidden.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return hidden + normed @ (bridges.up[layer] @ bridges.down[layer]).T + bridges.bias[layer]


def random_bridges(geometry: Geometry, seed: int, rank: int = 4) -> Bridges:
    """Random bridges, strong enough to show in the logits, on about two of three routable layers."""
    generator, bridges = torch.Generator().manual_seed(seed), Bridges(geometry, rank)
    width, first = geometry.hidden, geometry.context_layer
    for layer in range(first, first + geometry.routable):
        down, up, bias = (
            torch.randn(*shape, generator=generator) for shape in ((rank, width), (width, rank), (width,))
        )
        if torch.rand((), generator=generator) < 2 / 3:
            bridges.set(layer, 0.1 * down, 0.1 * up, 0.1 * bias)
    return bridges.freeze(torch.float32)


def arriving_states(model: PreTrainedModel, input_ids: Tensor, runs: Tensor, *rest) -> tuple[Tensor, list[Tensor]]:
    """`reference_logits`, and the states (B, T, D) that arrive at each layer meanwhile."""
    states: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in model.model.layers]
    try:
        return reference_logits(model, input_ids, runs, *rest), states
    finally:
        for hook in hooks:
            hook.remove()


def clamped(gates: list[bool], count: int) -> list[bool]:
    """Which layers run when gates are asked in turn: open ones until `count` have run, all where all are needed."""
    runs: list[bool] = []
    for index, is_open in enumerate(gates):
        remaining, left = count - sum(runs), len(gates) - index
        runs.append(remaining > 0 and (is_open or remaining == left))
    return runs


class FickleGates(LayerwiseRouter):
    """Gates that change at every token, for tests: waves along a fixed random direction of the state that arrives."""

    kind = "learned"

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(geometry.routable, geometry.hidden, generator=generator))

    def gate(self, index: int, hidden: Tensor, executed: Tensor) -> Tensor:
        return torch.sin(torch.nn.functional.layer_norm(hidden, hidden.shape[-1:]) @ self.weight[index])


class Fickle(Router):
    """Scores that change at every token, for tests: fixed random weights on all that the context holds."""

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        super().__init__(geometry)
        width = 2 * geometry.features + geometry.hidden
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", torch.randn(width, geometry.routable, generator=generator))

    def score(self, context: Context) -> Tensor:
        seen = [
            torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in (context.pooled, context.newest, context.hidden)
        ]
        return torch.cat(seen, -1) @ self.weight


def routed_tiny(
    family: str = "llama",
    router: type[Router | LayerwiseRouter] = Fickle,
    *,
    context_layer: int = 1,
    pool: str = "value",
    scope: str | None = None,
    bridges: bool = False,
    **settings,
) -> RoutedLM:
    """A tiny model with a router, which has another scope or random bridges on request."""
    backbone = tiny_backbone(family)
    planner = router(geometry_of(backbone, context_layer, pool))
    planner.scope = scope or planner.scope
    model = RoutedLM(backbone, planner, pool=pool, **settings)
    model.bridge(random_bridges(model.geometry, 0) if bridges else None)
    return model


def decoded(
    routed: RoutedLM, ids: Tensor, executed: Tensor, cuts: Sequence[int], mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Record]:
    """Logits (B, T, V), plans (B, T, L) and the record of forwards up to each cut, then of single tokens."""
    cache, logits = None, []
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with routed.at(executed=executed.tolist()) as record:
        for first, end in pairwise([0, *cuts, *range(cuts[-1] + 1, ids.shape[1] + 1)]):
            more = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, first:end]}
            step = routed.backbone.model(ids[:, first:end], cache=cache, use_cache=True, **more)
            cache = step.cache
            logits.append(step.logits)
    return torch.cat(logits, 1), torch.cat(record.runs, 1), record


@contextmanager
def whole_layers() -> Iterator[None]:
    """Layers compute every token and choose afterwards, so that no shape depends on the plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("buddy.engine.selection.MIN_SKIPPED", 10**6)
        yield
