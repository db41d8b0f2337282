"""One forward pass of a routed model: what was requested, the plan made after the context layer, and what ran."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import chain, groupby
from typing import Any, Literal

import torch
from torch import Tensor

from buddy.engine.bridges import Bridges
from buddy.engine.kv_cache import ContextPool, RoutedCache, context_features
from buddy.engine.kv_policies import POLICIES
from buddy.engine.record import ForwardRecord
from buddy.engine.sinks import SinkStates
from buddy.engine.transfer import to_device, to_host
from buddy.errors import BuddyError, BudgetError
from buddy.plan import Plan, check_counts, counts_over, hold_scores, plan_rows_on_host
from buddy.router import AnyRouter, Context, scores_of
from buddy.schema import RoutingSection
from buddy.values import problem

# Which tokens run a layer: all (True), none (False), or how many of each row.
ActiveRows = bool | list[int]
PoolKind = Literal["value", "key", "both"]
PromptPlan = Literal["token", "shared"]
BatchPlan = Literal["row", "shared"]


@dataclass(frozen=True, kw_only=True)
class Settings(RoutingSection):
    """What holds for all forwards of a routed model: a recipe's section `routing`, and the depth of the backbone.

    Raises:
        BuddyError: a setting of another value than `RoutedLM` takes.
    """

    layers: int

    def __post_init__(self) -> None:
        for each in fields(RoutingSection):  # the bounds of a recipe
            if sentence := problem(each.name, getattr(self, each.name), each.type, each.metadata):
                raise BuddyError(sentence)

    @property
    def competing(self) -> int:
        """Tokens whose scores compete: `mean_over`, but 1 where several tokens or rows share a plan."""
        own = (self.prompt_plan, self.batch_plan, self.reroute_every) == ("token", "row", 1)
        return self.mean_over if own else 1

    def for_router(self, router: AnyRouter) -> Settings:
        """The settings under a router: one plan for each input, where that is its scope."""
        if router.scope == "token":
            return self
        if router.scope != "prompt":
            raise BuddyError(f"The scope of {type(router).__name__} is {router.scope!r}; make it 'token' or 'prompt'.")
        return replace(self, prompt_plan="shared", reroute_every=None)


@dataclass(frozen=True)
class Request:
    """What the next forwards are asked for: K for each row, or a plan.

    Attributes:
        executed: K for each row of the batch, or one for all; None for full depth.
        runs: (B, T, L) bool, a plan to run instead of the router's.
        gates: (B, T, L) with gradients, for straight-through training.
        prompt: length of the prompt in these tokens; None in generation, where the first forward is the prompt.
        gate_weighted: multiply what each layer adds by a layerwise router's weight, with gradients.
        choose: K (B,) for the contexts (B,) of prompts, where a budget predictor chooses it.
    """

    executed: tuple[int, ...] | None = None
    runs: Tensor | None = None
    gates: Tensor | None = None
    prompt: int | None = None
    gate_weighted: bool = False
    choose: Callable[[Context], Tensor] | None = None

    def for_rows(self, batch: int) -> Request:
        """The request for B rows; beams repeat its rows."""
        if self.executed is None or len(self.executed) in (1, batch):
            return self
        given = len(self.executed)
        if batch % given:
            raise BudgetError(f"{given} budgets were given for {batch} rows; give one, or one per row.")
        return replace(self, executed=tuple(k for k in self.executed for _ in range(batch // given)))


class RoutedForward:
    """What the layers of a routed model share during one forward.

    Args:
        settings: of the model.
        router: of the model.
        request: of this forward.
        shape: (B, T).
        past: positions before these tokens.
        mask: (B, past + T) of 0 and 1, or None where nothing is padded.
        cache: an adopted cache, or None.
        bridges: what tokens pass through in place of the layers that they skip.
        tokens: (B, T) long, or None for embeddings.

    Attributes:
        active_rows: for each layer which tokens run it, or None where the layer has more to do than run: the context
            layer, layers that a layerwise router has not decided yet, and, where gates are given, all after the
            context layer.
        sink: the states of the sink of a prompt, where they depend on its token alone.
        undecided: whether layers ask for their decision when their input arrives, as a layerwise router's do.
        full_layers, partial_layers: what the layers counted so far; see `ForwardRecord`.
    """

    undecided = False

    def __init__(
        self,
        settings: Settings,
        router: AnyRouter,
        request: Request,
        shape: tuple[int, int],
        past: int,
        mask: Tensor | None,
        cache: RoutedCache | None,
        bridges: Bridges | None,
        tokens: Tensor | None,
    ) -> None:
        self.settings, self.router, self.request, self.shape, self.past = settings, router, request, shape, past
        self.cache, self.bridges, self.tokens = cache, bridges, tokens
        self.policy, self.context_layer = POLICIES[settings.policy], settings.context_layer
        self.active_rows: list[ActiveRows | None] = [True] * settings.layers
        self.active_rows[settings.context_layer - 1] = None
        self.valid: Tensor | None = None
        self.positions: Tensor | None = None
        if mask is not None:
            self.valid = mask[:, -shape[1] :].bool()
            self.positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -shape[1] :]
        self.sink: SinkStates | None = None
        self.writable: Tensor | None = None  # a hidden state of the engine's own, which layers may change in place
        self.context: Context | None = None
        self.scores: Tensor | None = None
        self.full_layers = 0
        self.partial_layers: list[Tensor] = []
        self._runs: Tensor | None = None
        self._runs_on_host: list[list[bool]] | None = None  # L lists of B: a plan for one new token of each row
        self._kv_width = 0

    def make_plan(self, hidden: Tensor, keys: Tensor, values: Tensor) -> None:
        """Called by the context layer, with its output (B, T, D) and the K and V (B, heads, T, size) that it wrote."""
        pool = ContextPool(self.settings.pool) if self.cache is None else self.cache.pool
        newest = context_features(keys, values, pool.kind)
        self._kv_width = keys.shape[1] * keys.shape[3]
        pooled = pool.add(newest, self.valid)
        request = self.request
        if request.executed is not None:
            check_counts(request.executed, self.context_layer + 1, self.settings.layers)
        full_depth = request.executed is None or min(request.executed) == self.settings.layers
        prompt = self._shared_prompt()
        # A prompt that shares its last token's plan, while serving, needs no other token's context.
        only_last = request.prompt is None and prompt == self.shape[1]
        if only_last and self.padding is not None and to_host(self.padding[:, -1].any()):
            raise BudgetError(
                "A prompt that shares its last token's plan is padded on the left and, where it is, read in one piece; "
                "pad it so, and leave out prefill_chunk_size."
            )
        context = Context(pooled, newest, hidden, self._executed(hidden.device), self.tokens)
        if only_last and self.shape[1] > 1:
            context = context[:, -1:]
        context = replace(context, hidden=context.hidden.float())
        self.context = context
        if request.runs is not None:
            self._run_plan(request.runs)
        elif not full_depth:
            if prompt and self.cache is not None:
                self.cache.shared = True
            self._decide(prompt, only_last)
        elif self.settings.competing > 1 and self.cache is not None and self.cache.scores is not None:
            scores = self.cache.scores
            self._keep_scores(scores.new_full((*self.shape, scores.shape[2]), -math.inf))

    def skip(self, layer: int, hidden: Tensor) -> Tensor:
        """The state (B, T, D) of tokens that skip `layer`, from the state before it."""
        return hidden if self.bridges is None else self.bridges.forward(layer, hidden)

    def chosen(self, layer: int) -> Tensor:
        """(B, T) bool, the tokens that run `layer`."""
        if self._runs is None:
            self._runs = self.record().runs
        return self._runs[..., layer]

    def record(self) -> ForwardRecord:
        """The plan, and what the layers counted so far."""
        device, layers = self.context.executed.device, self.settings.layers
        plan = self._runs_on_host if self._runs is None else self._runs
        sinks = self.sinks if self.past < self.settings.sink_tokens or self.valid is not None else None
        return ForwardRecord(self.shape, layers, device, plan, sinks, self.full_layers, self.partial_layers)

    @cached_property
    def sinks(self) -> Tensor:
        """(B, T) bool, the positions that run at full depth whatever the budget."""
        if self.positions is not None:
            return (self.positions < self.settings.sink_tokens) & self.valid
        positions = torch.arange(self.past, self.past + self.shape[1], device=self.context.executed.device)
        return (positions < self.settings.sink_tokens).expand(self.shape)

    def only_sinks(self, active_rows: list[int]) -> bool:
        """Whether the tokens that run a layer are just the leading sinks of these positions, in every row."""
        sinks = self.settings.sink_tokens - self.past
        return self.shape[1] > 1 and self.valid is None and all(count == sinks for count in active_rows)

    def may_share_sink(self) -> bool:
        """Whether this is a prompt whose first token may run some layers alone, so that its states are kept."""
        settings, executed = self.settings, self.request.executed
        prompt = self.cache is not None and self.past == 0 and self.shape[1] > 1 and self.valid is None
        skips = executed is not None and min(executed) < settings.layers and settings.policy != "hole"
        return prompt and skips and settings.sink_tokens == 1 and not torch.is_grad_enabled()

    def can_defer(self, layer: int) -> bool:
        """Whether the states that skip `layer` may be pending: one token's always, a prompt's if memory allows.

        One state of D values is pending for a run of skipped layers, in place of keys and values for each of them. With
        bridges the state differs from layer to layer.
        """
        return self.shape[1] == 1 or self._deferrable[layer]

    @cached_property
    def _deferrable(self) -> list[bool]:
        width, kv = self.context.hidden.shape[-1], 2 * self._kv_width
        skipped = [rows is False or (isinstance(rows, list) and self.only_sinks(rows)) for rows in self.active_rows]
        blocks = [list(block) for skips, block in groupby(range(len(skipped)), key=skipped.__getitem__) if skips]
        if self.bridges is not None:
            blocks = [[layer] for block in blocks for layer in block]
        if len(blocks) * width <= sum(map(len, blocks)) * kv:
            return [True] * len(skipped)
        long = {layer for block in blocks if width <= len(block) * kv for layer in block}
        return [layer in long for layer in range(len(skipped))]

    def _executed(self, device: torch.device) -> Tensor:
        """(B, T) long, K for each token."""
        executed = self.request.executed
        if executed is None or len(executed) == 1:
            count = self.settings.layers if executed is None else executed[0]
            return torch.full((1, 1), count, device=device).expand(self.shape)
        return to_device(executed, device)[:, None].expand(self.shape)

    def _shared_prompt(self) -> int:
        """The number of tokens at the start that share one plan."""
        if self.settings.prompt_plan != "shared":
            return 0
        if self.request.prompt is not None:
            return self.request.prompt
        return self.shape[1] if self.shape[1] > 1 and self.past == 0 else 0

    def _decide(self, prompt: int, only_last: bool) -> None:
        """Ask the router, and run the plan of its scores."""
        scores, every = self._mean_over_batch(scores_of(self.router, self.context)), self.settings.reroute_every
        first = 0 if every == 1 else self._first_decision()
        if not only_last:
            before = None if self.cache is None else self.cache.scores
            scores = hold_scores(scores, first, every, prompt, before)
        if every != 1 and self.cache is not None:
            self.cache.scores = scores[:, -1:]
        self._run_scores(scores)

    def _run_scores(self, scores: Tensor) -> None:
        """Run the plan of the scores that hold."""
        self.scores, layers, executed = scores, self.settings.layers, self._counts(scores)
        if self.shape[1] == 1 and (self.past >= self.settings.sink_tokens if self.valid is None else self._mid_text()):
            counts: Sequence[int] = self.request.executed
            if executed is self.context.executed:
                values = to_host(scores[:, 0])
            else:
                values = to_host(torch.cat([scores[:, 0], executed], 1))  # both at once
                counts = [int(row.pop()) for row in values]
            _require_finite(all(map(math.isfinite, chain.from_iterable(values))))
            self._runs_on_host = rows = plan_rows_on_host(values, counts, layers)
            self._set_active_rows([row[0] for row in rows] if len(scores) == 1 else [active(row, 1) for row in rows])
        else:
            _require_finite(to_host(scores.isfinite().all()))
            self._run_plan(Plan.from_scores(scores, executed, layers).runs.expand(*self.shape, -1))

    def _counts(self, scores: Tensor) -> Tensor:
        """(B, T) long, layers of each token: K, or what its scores (B, T, R) win against those of earlier tokens."""
        executed, over = self.context.executed, self.settings.competing
        if over == 1:
            return executed
        always = self.settings.context_layer + 1
        full = executed == self.settings.layers  # takes part in no competition, whatever the other rows do
        absent = full | self.sinks if self.valid is None else full | self.sinks | ~self.valid
        competing = scores.masked_fill(absent[..., None], -math.inf)
        cache = self.cache
        before, excess = (None, None) if cache is None else (cache.scores, cache.excess)
        counts, excess = counts_over(competing, executed - always, over, before, excess)
        if cache is not None:
            cache.excess = excess
            self._keep_scores(competing)
        return torch.where(full, executed, always + counts)

    def _keep_scores(self, scores: Tensor) -> None:
        """Scores (B, T, R) that later tokens compete with."""
        before = self.cache.scores
        every = scores if before is None else torch.cat([before, scores], 1)
        self.cache.scores = every[:, 1 - self.settings.competing :]

    def _mid_text(self) -> bool:
        """Whether none of these positions of padded rows is padding or a sink."""
        if self.cache is not None and self.cache.shortest is not None:
            return self.cache.shortest >= self.settings.sink_tokens
        return to_host(torch.where(self.valid, self.positions, -1).min()) >= self.settings.sink_tokens

    def _run_plan(self, runs: Tensor) -> None:
        """Run a plan (B, T, L)."""
        self._runs = runs = self._with_sinks(runs)
        counts = to_host(runs.sum(1).t())  # (L, B); the layers need them on the host
        self._set_active_rows([active(each, self.shape[1]) for each in counts])

    def _with_sinks(self, runs: Tensor) -> Tensor:
        """A plan (B, T, …) with full depth for sinks; padding runs a layer where all other tokens of its row do."""
        if self.settings.sink_tokens:
            runs = runs | self.sinks[..., None]
        if self.padding is not None:
            runs = torch.where(self.padding, (runs | self.padding).all(1, keepdim=True), runs)
        return runs

    @cached_property
    def padding(self) -> Tensor | None:
        """(B, T, 1) bool; None where none of these positions is padding."""
        return None if self.valid is None or to_host(self.valid.all()) else ~self.valid[..., None]

    def _set_active_rows(self, rows: list[ActiveRows]) -> None:
        first = self.context_layer
        self.active_rows[first:] = rows[first:] if self.request.gates is None else [None] * (len(rows) - first)

    def _mean_over_batch(self, scores: Tensor, tokens: Any = slice(None)) -> Tensor:
        """Scores (B, T, …); where the batch shares one plan, their mean over the rows that have a token there.

        Args:
            tokens: which of the forward's tokens the T are.
        """
        if self.settings.batch_plan != "shared":
            return scores
        if self.valid is None:
            return scores.mean(0, keepdim=True).expand_as(scores)
        weight = self.valid[:, tokens][:, -scores.shape[1] :].to(scores)
        weight = weight.view(*weight.shape, *[1] * (scores.dim() - 2))
        return ((scores * weight).sum(0, keepdim=True) / weight.sum(0, keepdim=True).clamp(min=1)).expand_as(scores)

    def _first_decision(self) -> int:
        """Index among these tokens of the prompt's last one; negative where it precedes them."""
        if self.request.prompt is not None:
            return self.request.prompt - 1
        last = self.past + self.shape[1] - 1
        if self.cache is None:
            return self.shape[1] - 1
        if self.past == 0 or self.cache.decided is None:
            self.cache.decided = self.past or last  # after a prompt at full depth the first token decides
        return self.cache.decided - self.past


def _require_finite(finite: bool) -> None:
    if not finite:
        raise BuddyError(
            "The router gives scores that are not finite, which order no layers; correct its score, or train it at a "
            "lower rate."
        )


def active(counts: Any, most: int) -> ActiveRows:
    """`ActiveRows` of a list of counts: True where every row's count is `most`, False where each is 0."""
    return True if min(counts) == most else counts if max(counts) else False
