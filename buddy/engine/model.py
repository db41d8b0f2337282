"""`RoutedLM`: a frozen language model whose layers run by plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from buddy.backbone import Backbone
from buddy.budget import executed_layers
from buddy.engine.cache import Pool, adopt
from buddy.engine.forward import Pass, plan_tokens
from buddy.engine.layers import Seat, attach, detach
from buddy.errors import BudgetError
from buddy.router import Context, Geometry, Router

PoolKind = Literal["value", "key", "both"]


def geometry_of(backbone: Backbone, context_layer: int = 1, pool: PoolKind = "value") -> Geometry:
    """The sizes that a router for this backbone needs."""
    features = backbone.kv_size * (2 if pool == "both" else 1)
    return Geometry(
        layers=backbone.num_layers, context_layer=context_layer, hidden=backbone.hidden_size, features=features
    )


@dataclass(frozen=True)
class Request:
    """What the next forwards are asked for: K per row, or a plan made elsewhere."""

    executed: Tensor | None = None
    runs: Tensor | None = None
    gates: Tensor | None = None
    prompt: int | None = None
    everything: bool = False


@dataclass
class Record:
    """What ran while a request held, one entry a forward: executed layers (B, T) and which of them were sinks."""

    executed: list[Tensor] = field(default_factory=list)
    sinks: list[Tensor] = field(default_factory=list)
    runs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Output:
    """Result of a routed forward over whole windows.

    Attributes:
        logits: (B, T', V) of the positions kept.
        context: what the router saw, leading dimensions (B, T).
        scores: (B, T, R), or None where the router was not asked.
        runs: (B, T, L) bool, the plan with sinks at full depth.
        executed: (B, T) long, layers that really ran.
        sinks: (B, T) bool, positions at full depth whatever the budget.
    """

    logits: Tensor
    context: Context
    scores: Tensor | None
    runs: Tensor
    executed: Tensor
    sinks: Tensor


class RoutedLM(nn.Module):
    """Hosts a backbone and a router; the backbone's own `forward` and `generate` obey the budget set by `at`.

    Args:
        backbone: a frozen model; its layers are made skippable in place until `detach`.
        router: scores its routable layers.
        pool: which of the context layer's cached states are pooled.
        sink_tokens: first positions of every row at full depth (attention sinks, 2309.17453), counted apart.
        prompt_plan: "token" plans for each prompt token, "shared" gives the whole prompt its last token's plan.
    """

    def __init__(
        self,
        backbone: Backbone,
        router: Router,
        *,
        pool: PoolKind = "value",
        sink_tokens: int = 1,
        prompt_plan: Literal["token", "shared"] = "token",
    ) -> None:
        super().__init__()
        self.router = router.to(backbone.device)
        self.geometry = router.geometry
        self.pool, self.sink_tokens, self.prompt_plan = pool, sink_tokens, prompt_plan
        self._held = (backbone,)  # in a tuple: the frozen backbone is not part of this module's state
        self._seat, self._request, self._record = Seat(), None, None
        attach(backbone.layers, self._seat, _probes(backbone))
        base = backbone.base
        self._hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, always_call=True),
        ]

    @property
    def backbone(self) -> Backbone:
        """The frozen model, with its tokenizer."""
        return self._held[0]

    def detach(self) -> None:
        """Give the stock model back, class by class and hook by hook."""
        for hook in self._hooks:
            hook.remove()
        detach(self.backbone.layers)

    def executed_layers(self, budget: float | int | str) -> int:
        """K for a budget of this model.

        Raises:
            BudgetError: out of range, or less than full depth from a router that runs every layer.
        """
        count = executed_layers(budget, self.geometry.layers, self.geometry.always_on)
        if self.router.full_depth and count < self.geometry.layers:
            raise BudgetError(
                f"This router runs every layer; ask for budget 1.0 instead of {budget}, or another router."
            )
        return count

    @contextmanager
    def at(self, *budgets: float | int | str, executed: Sequence[int] | None = None) -> Iterator[Record]:
        """Within this block the backbone's `forward` and `generate` spend the given budget.

        Args:
            budgets: one for the whole batch or one per row.
            executed: the same in layers.
        """
        counts = [self.executed_layers(budget) for budget in budgets] if executed is None else list(executed)
        with self._requested(Request(executed=torch.tensor(counts))) as record:
            yield record

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        executed: Tensor | None = None,
        runs: Tensor | None = None,
        gates: Tensor | None = None,
        prompt: int = 0,
        keep: Tensor | int = 0,
        everything: bool = False,
    ) -> Output:
        """The parallel form: every token routed on its own prefix, as step-by-step decoding would.

        Args:
            input_ids: (B, T) long.
            attention_mask: (B, T), 0 for padding.
            executed: (B,) long, K per row; None with `runs` None means full depth.
            runs: (B, T, L) bool, a plan to run instead of the router's.
            gates: (B, T, L) with gradients for straight-through training, beside `runs`.
            prompt: tokens at the start that share one plan where `prompt_plan` is "shared".
            keep: positions whose logits are wanted, as transformers' `logits_to_keep`; 0 for all.
            everything: compute each layer on every token and choose afterwards. Slower, but no shape, and so no
                rounding, depends on the plan; gates imply it.
        """
        shared = prompt if self.prompt_plan == "shared" else 0
        with self._requested(Request(executed, runs, gates, shared, everything)) as record:
            logits = self.backbone.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=keep
            ).logits
            done = self._last
        return Output(logits, done.context, done.scores, done.runs, record.executed[-1], record.sinks[-1])

    def plan(self, scores: Tensor, executed: Tensor, prompt: int = 0) -> Tensor:
        """(B, T, L) bool: the plan for scores (B, T, R) and K per row (B,), to be given to `forward` as `runs`."""
        shared = prompt if self.prompt_plan == "shared" else 0
        return plan_tokens(scores, executed[:, None].expand(scores.shape[:2]), self.geometry.layers, shared)

    @torch.no_grad()
    def dense(self, input_ids: Tensor, attention_mask: Tensor | None = None, keep: Tensor | int = 0) -> Tensor:
        """Logits (B, T', V) of the stock model, routing left out."""
        return self.backbone.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=keep
        ).logits

    @contextmanager
    def _requested(self, request: Request) -> Iterator[Record]:
        before = self._request, self._record
        self._request, self._record = request, Record()
        try:
            yield self._record
        finally:
            self._request, self._record = before

    def _begin(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the decoder runs: a fresh pass for the request that holds, or none."""
        self._seat.current = None
        if self._request is None:
            return None
        kwargs = {**kwargs, **({"input_ids": args[0]} if args else {})}
        tokens = kwargs.get("input_ids")
        batch, length = (kwargs["inputs_embeds"] if tokens is None else tokens).shape[:2]
        cache = kwargs.get("cache")
        use_cache = kwargs.get("use_cache")
        if cache is None and (base.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["cache"] = DynamicCache(config=base.config)
        context = self.geometry.context_layer - 1
        past = 0 if cache is None else cache.get_seq_length(context)
        pool = Pool(context, self.pool) if cache is None else adopt(cache, context, self.pool)
        valid, positions = _positions(kwargs.get("attention_mask"), past, length, batch, self.backbone.device)
        request = self._request
        prompt = length if self.prompt_plan == "shared" and past == 0 and length > 1 else 0
        self._seat.current = Pass(
            layers=self.geometry.layers,
            context_layer=self.geometry.context_layer,
            score=self.router.score,
            pool=pool,
            positions=positions,
            valid=valid,
            executed=_per_row(request.executed, batch),
            sink_tokens=self.sink_tokens,
            shared=prompt if request.prompt is None else request.prompt,
            runs=request.runs,
            gates=request.gates,
            everything=request.everything,
        )
        return (), kwargs

    def _end(self, *_: Any) -> None:
        done, self._seat.current = self._seat.current, None
        if done is None or done.context is None:
            return
        self._last = done
        self._record.executed.append(done.executed_layers())
        self._record.sinks.append(done.sinks())
        self._record.runs.append(done.runs)


def _per_row(executed: Tensor | None, batch: int) -> Tensor | None:
    """K for each of B rows; beams repeat the rows of the request."""
    if executed is None or executed.shape[0] == batch:
        return executed
    if batch % executed.shape[0]:
        raise BudgetError(f"{executed.shape[0]} budgets were given for {batch} rows; give one, or one per row.")
    return executed.repeat_interleave(batch // executed.shape[0])


def _positions(
    mask: Tensor | None, past: int, length: int, batch: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Which of the new tokens are real (B, T) bool or None, and their positions (B or 1, T) with padding not counted."""
    if mask is None:
        return None, torch.arange(past, past + length, device=device)[None]
    if mask.dim() != 2:
        raise BudgetError("Routing needs the attention mask in two dimensions (rows × tokens); pass that, or none.")
    return mask[:, -length:].bool(), (mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]


def _probes(backbone: Backbone) -> list[tuple[Tensor, Any]]:
    """A random hidden state and its position embeddings for each layer, to compare ways of writing K/V."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, backbone.hidden_size, generator=generator).to(backbone.device, backbone.dtype)
    positions = torch.arange(3, device=backbone.device)[None]
    base, config = backbone.base, backbone.base.config
    kinds = getattr(config, "layer_types", None) or [None] * backbone.num_layers
    return [(hidden, _embeddings(base.rotary_emb, hidden, positions, kind)) for kind in kinds[: backbone.num_layers]]


def _embeddings(rotary: nn.Module, hidden: Tensor, positions: Tensor, kind: str | None) -> Any:
    try:
        return rotary(hidden, positions)
    except (TypeError, AttributeError, KeyError):  # Gemma 3 keeps one table a kind of attention
        return rotary(hidden, positions, kind)
