"""One forward pass of a routed model: from the context layer's output to a plan, and what ran.

What the next forwards are asked for, what holds for all of them, and who decides for whom.

What ran: noted by the layers as they run, spelt out in tensors only when asked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from buddy.engine.kv_cache import Pool, RoutedCache, features
from buddy.engine.selection import Group, take
from buddy.engine.sinks import SinkStates
from buddy.errors import BuddyError, BudgetError
from buddy.plan import Plan
from buddy.router import AnyRouter, Context


@dataclass(frozen=True)
class Request:
    """What the next forwards are asked for: K per row, or a plan made elsewhere.

    Attributes:
        executed: K for each row of the batch, or one for all; None for full depth.
        runs: (B, T, L) bool, a plan to run instead of the router's.
        gates: (B, T, L) with gradients, for straight-through training.
        prompt: length of the prompt in these tokens; None in generation, where the first forward is the prompt.
        compute_all_layers: compute each layer on every token and choose afterwards.
        gate_weighted: multiply what each layer adds by a layerwise router's weight, with gradients.
        choose: K (B,) for the contexts (B,) of prompts, where a predictor chooses it.
    """

    executed: tuple[int, ...] | None = None
    runs: Tensor | None = None
    gates: Tensor | None = None
    prompt: int | None = None
    compute_all_layers: bool = False
    gate_weighted: bool = False
    choose: Callable[[Context], Tensor] | None = None


@dataclass(frozen=True)
class Settings:
    """What holds for all forwards of a routed model."""

    layers: int
    context_layer: int
    sink_tokens: int
    prompt_plan: str
    batch_plan: str
    reroute_every: int | None


def deciders(length: int, first: int, every: int | None, device: torch.device | None = None) -> Tensor:
    """(T,) long: for each of `length` tokens the index of the one whose decision it follows.

    Args:
        first: index of the prompt's last token among them; negative where it lies before them, as indices then may be.
        every: after it only each `every`-th token decides; None: none does.
    """
    since = torch.arange(length, device=device) - first  # tokens since the last one of the prompt
    return first + torch.where(since > 0, since - (since % every if every else since), since)


def held_scores(scores: Tensor, first: int, every: int | None, before: Tensor | None = None) -> Tensor:
    """Scores (B, T, R) that hold where only every `every`-th token after position `first` decides (None: none does).

    Args:
        first: index of the prompt's last token among the T; negative where it lies before them.
        before: (B, 1, R), the scores that hold from before these tokens.
    """
    if every == 1:
        return scores
    at = deciders(scores.shape[1], first, every, scores.device)
    held = scores[:, at.clamp(min=0)]
    return held if before is None else torch.where((at < 0)[None, :, None], before, held)


def plan_tokens(scores: Tensor, executed: Tensor, layers: int, shared: int = 0) -> Tensor:
    """(B, T, L) bool from scores (B, T, R) and K (B, T); the first `shared` tokens take their last one's plan."""
    runs = Plan.from_scores(scores, executed, layers).runs
    if shared:
        last = runs[:, shared - 1 : shared]
        runs = torch.cat([last.expand(-1, shared, -1), runs[:, shared:]], 1)
    return runs


def within_scope(router: AnyRouter, settings: Settings) -> Settings:
    """The settings that hold for a router: those of one plan an input, where that is its scope."""
    if router.scope == "token":
        return settings
    if router.scope != "prompt":
        raise BuddyError(f"The scope of {type(router).__name__} is {router.scope!r}; make it 'token' or 'prompt'.")
    return replace(settings, prompt_plan="shared", reroute_every=None)


def for_rows(request: Request, batch: int) -> Request:
    """The request for B rows; beams repeat its rows."""
    given = len(request.executed)
    if given in (1, batch):
        return request
    if batch % given:
        raise BudgetError(f"{given} budgets were given for {batch} rows; give one, or one per row.")
    return replace(request, executed=tuple(k for k in request.executed for _ in range(batch // given)))


def checked_mask(mask: Tensor | None) -> Tensor | None:
    """The mask (B, positions), or None where it hides nothing."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise BudgetError("Routing needs the attention mask in two dimensions (rows × tokens); pass that, or none.")
    return None if bool(mask.all()) else mask


def wants_cache(config: PreTrainedConfig, kwargs: dict[str, Any]) -> bool:
    """Whether a forward with these arguments fills a cache."""
    asked = kwargs.get("use_cache")
    return config.use_cache if asked is None else asked


@dataclass
class ForwardRecord:
    """What one forward planned and ran.

    Attributes:
        shape: (B, T).
        layers: L.
        device: of the tensors that are asked for.
        plan: (B, T, L) bool, or L lists of B for one new token a row, or None where every layer ran.
        sink: (B, T) bool, positions at full depth whatever the budget; None for none.
        whole: layers that recorded every token.
        parts: (B, T) bool of each layer that recorded some tokens.
    """

    shape: tuple[int, int]
    layers: int
    device: torch.device
    plan: Tensor | list[list[bool]] | None
    sink: Tensor | None
    whole: int = 0
    parts: list[Tensor] = field(default_factory=list)

    @property
    def executed(self) -> Tensor:
        """(B, T) long, the layers that each token ran, as the layers themselves recorded it."""
        total = torch.full(self.shape, self.whole, dtype=torch.long, device=self.device)
        for part in self.parts:
            total += part
        return total

    @property
    def runs(self) -> Tensor:
        """(B, T, L) bool, the plan with sinks at full depth."""
        if isinstance(self.plan, Tensor):
            return self.plan
        if self.plan is None:
            return torch.ones(*self.shape, self.layers, dtype=torch.bool, device=self.device)
        return torch.tensor(self.plan, device=self.device).t()[:, None]

    @property
    def sinks(self) -> Tensor:
        """(B, T) bool, positions at full depth whatever the budget."""
        return torch.zeros(self.shape, dtype=torch.bool, device=self.device) if self.sink is None else self.sink


@dataclass
class Record:
    """What ran while a request held, one entry a forward.

    Attributes:
        auto_executed: K for each row, where a budget predictor chose it last.
    """

    forwards: list[ForwardRecord] = field(default_factory=list)
    auto_executed: tuple[int, ...] = ()

    @property
    def executed(self) -> list[Tensor]:
        """(B, T) long each: layers that each token really ran."""
        return [ran.executed for ran in self.forwards]

    @property
    def sinks(self) -> list[Tensor]:
        """(B, T) bool each: positions at full depth whatever the budget."""
        return [ran.sinks for ran in self.forwards]

    @property
    def runs(self) -> list[Tensor]:
        """(B, T, L) bool each: the plans, sinks at full depth."""
        return [ran.runs for ran in self.forwards]


@dataclass(frozen=True)
class Output:
    """Result of a routed forward over whole windows.

    Attributes:
        logits: (B, T', V) of the positions kept.
        context: what the router saw, leading dimensions (B, T).
        scores: (B, T, R), or None where the router was not asked, or is layerwise.
        runs: (B, T, L) bool, the plan with sinks at full depth.
        executed: (B, T) long, layers that really ran.
        sinks: (B, T) bool, positions at full depth whatever the budget.
        weights: (B, T, R) with gradients, those of the routable layers; of a weighted forward only.
    """

    logits: Tensor
    context: Context
    scores: Tensor | None
    runs: Tensor
    executed: Tensor
    sinks: Tensor
    weights: Tensor | None = None


Score = Callable[[Context], Tensor]


class RoutedForward:
    """What the layers of a routed model share during one forward.

    Args:
        settings: of the model.
        score: the router's; None in a pass that does not ask for scores.
        request: of this forward.
        shape: (B, T).
        past: positions before these tokens.
        mask: (B, past + T) of 0 and 1, or None where nothing is padded.
        cache: an adopted cache, or None.
        pool: what the context is pooled from; the cache's where there is one.
    """

    undecided = False  # whether the next layers decide when their input arrives; a layerwise router's do

    def __init__(
        self,
        settings: Settings,
        score: Score | None,
        request: Request,
        shape: tuple[int, int],
        past: int,
        mask: Tensor | None,
        cache: RoutedCache | None,
        pool: Pool,
    ) -> None:
        self.settings, self.score, self.request, self.shape, self.past = settings, score, request, shape, past
        self.cache, self.pool = cache, pool
        self.context_layer = settings.context_layer
        # For each layer: everyone runs it (True), nobody (False), some (how many tokens of each row), or it goes its
        # own way (None): the context layer, those undecided, and all after it where everything is computed.
        self.active_rows: list[bool | list[int] | None] = [True] * settings.layers
        self.active_rows[settings.context_layer - 1] = None
        self.compute_all_layers = request.compute_all_layers or request.gates is not None
        self.valid, self.positions = None, None
        if mask is not None:
            self.valid = mask[:, -shape[1] :].bool()
            self.positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -shape[1] :]
        self.context: Context | None = None
        self.scores: Tensor | None = None
        self._runs: Tensor | None = None
        self._rows_on: list[list[bool]] | None = None  # (L, B): a plan for one new token, held by the host
        self._kv_width = 0
        self._deferrable: list[bool] | None = None
        self.remember: Callable[[int], SinkStates] | None = None  # sinks' states, where their tokens are known
        self._sink_states: SinkStates | None = None
        self.whole = 0  # layers that ran on every token
        self.parts: list[Tensor] = []  # (B, T) bool of those that ran on some

    def make_plan(self, hidden: Tensor, keys: Tensor, values: Tensor) -> None:
        """Called by the context layer: hidden (B, T, D) as it leaves it, K and V (B, heads, T, size) it wrote."""
        newest = features(keys, values, self.pool.kind)
        self._kv_width = keys.shape[1] * keys.shape[3]
        pooled = self.pool.add(newest, self.valid)
        request, settings = self.request, self.settings
        full = request.executed is None or min(request.executed) == settings.layers
        prompt = self._prompt_plan()
        # A prompt that shares its last token's plan, while serving, needs no other token's context.
        only_last = request.prompt is None and prompt == self.shape[1]
        parts = pooled, newest, hidden, self._asked(hidden.device)
        if only_last and self.shape[1] > 1:
            parts = tuple(part[:, -1:] for part in parts)  # type: ignore[assignment]
        pooled, newest, hidden, executed = parts
        self.context = Context(pooled, newest, hidden.float(), executed)
        if request.runs is not None:
            self._take(request.runs)
        elif self.compute_all_layers and full:
            self._take(self.runs)
        elif not full:
            self._decide(prompt, only_last)

    def _decide(self, prompt: int, only_last: bool) -> None:
        """Ask the router, and take the plan for its answer."""
        scores = self._shared_by_batch(self.score(self.context))
        self.scores = self._decide_once(scores) if only_last else self._decided(scores)
        self._follow(0 if only_last else prompt)

    def _follow(self, prompt: int) -> None:
        """Take the plan for the scores that hold; the first `prompt` tokens share one."""
        if self.shape[1] == 1 and self.valid is None and self.past >= self.settings.sink_tokens:
            self._take_on_host(self.scores)
        else:
            runs = plan_tokens(self.scores, self.context.executed, self.settings.layers, prompt)
            self._take(runs.expand(*self.shape, -1))

    @property
    def runs(self) -> Tensor:
        """(B, T, L) bool, the plan with sinks at full depth."""
        return self.ran().runs

    def chosen(self, layer: int) -> Tensor:
        """(B, T) bool, the tokens that run `layer`."""
        if self._runs is None:
            self._runs = self.runs
        return self._runs[..., layer]

    def ran(self) -> ForwardRecord:
        """What the layers recorded so far, and the plan."""
        device, layers = self.context.executed.device, self.settings.layers
        plan = self._rows_on if self._runs is None else self._runs
        sinks = self.sinks() if self.past < self.settings.sink_tokens or self.valid is not None else None
        return ForwardRecord(self.shape, layers, device, plan, sinks, self.whole, self.parts)

    def sinks(self) -> Tensor:
        """(B, T) bool, the positions that run at full depth whatever the budget."""
        device = self.context.executed.device
        if self.positions is not None:
            return (self.positions < self.settings.sink_tokens) & self.valid
        positions = torch.arange(self.past, self.past + self.shape[1], device=device)
        return (positions < self.settings.sink_tokens).expand(self.shape)

    def mask(self, mask: Tensor | None, group: Group, device: torch.device) -> Tensor | None:
        """The attention mask (G, 1, n, S) of the queries of one call, from the layer's (B or 1, 1, T, S)."""
        rows, positions, (batch, length) = group.rows, group.positions, self.shape
        if mask is None:
            # Stock code leaves the mask out where it is plainly causal; a selection of queries needs it spelt out.
            if positions is None or length == 1:
                return None
            return (torch.arange(length, device=device) <= positions[..., None])[:, None]
        if positions is None:
            return mask[rows] if mask.shape[0] == batch > 1 else mask
        return take(mask[:, 0], rows, positions, batch)[:, None]

    def only_sinks(self, who: list[int]) -> bool:
        """Whether the tokens that run are just the leading sinks of these positions, in every row."""
        lead = self.settings.sink_tokens - self.past
        return self.shape[1] > 1 and self.valid is None and all(count == lead for count in who)

    def sink_states(self, count: int) -> SinkStates | None:
        """What the first `count` tokens become in each layer; None where that depends on more than their ids."""
        if self.remember is not None and not self.past and self.valid is None:
            self._sink_states, self.remember = self.remember(count), None  # asked once, whatever the answer
        return self._sink_states

    def can_defer(self, layer: int) -> bool:
        """Whether states that skip `layer` may wait in the cache: one token's always, a prompt's if memory allows.

        One state of D values waits for a run of skipped layers, in place of keys and values for each of them.
        """
        if self.shape[1] == 1:
            return True
        if self._deferrable is None:
            self._deferrable = self._deferrable_layers()
        return self._deferrable[layer]

    def _deferrable_layers(self) -> list[bool]:
        width, kv = self.context.hidden.shape[-1], 2 * self._kv_width
        idle = [who is False or (isinstance(who, list) and self.only_sinks(who)) for who in self.active_rows]
        runs = [list(group) for on, group in groupby(range(len(idle)), key=idle.__getitem__) if on]
        if len(runs) * width <= sum(map(len, runs)) * kv:
            return [True] * len(idle)
        long = {layer for run in runs if width <= len(run) * kv for layer in run}
        return [layer in long for layer in range(len(idle))]

    def _asked(self, device: torch.device) -> Tensor:
        """(B, T) long, K for each token."""
        executed = self.request.executed
        if executed is None or len(executed) == 1:
            return torch.full((1, 1), self.settings.layers if executed is None else executed[0], device=device).expand(
                self.shape
            )
        return torch.tensor(executed, device=device)[:, None].expand(self.shape)

    def _shared_by_batch(self, scores: Tensor) -> Tensor:
        """One plan for the batch, where that is asked: the mean over the rows that have a token there."""
        if self.settings.batch_plan != "shared":
            return scores
        if self.valid is None:
            return scores.mean(0, keepdim=True).expand_as(scores)
        weight = self.valid[:, -scores.shape[1] :, None].to(scores)
        return ((scores * weight).sum(0, keepdim=True) / weight.sum(0, keepdim=True).clamp(min=1)).expand_as(scores)

    def _decide_once(self, scores: Tensor) -> Tensor:
        """Scores (B, 1, R) of a prompt's last token, kept for the tokens after it that do not decide."""
        if self.cache is not None and self.settings.reroute_every != 1:
            self.cache.scores = scores
            self.cache.decided = self.cache.decision = self.past + self.shape[1] - 1
        return scores

    def _decided(self, scores: Tensor) -> Tensor:
        """Scores (B, T, R) that hold: those of the last decision where not every token decides."""
        every, cache = self.settings.reroute_every, self.cache
        if every == 1:
            return scores
        first = self._first_decision(cache)
        held = held_scores(scores, first, every, None if cache is None else cache.scores)
        if cache is not None:
            since = self.shape[1] - 1 - first
            last = self.past + first + (since - since % every if every else 0)
            cache.scores = held[:, -1:]
            cache.decision = last if last >= self.past or cache.decision is None else cache.decision
        return held

    def _first_decision(self, cache: RoutedCache | None) -> int:
        """Index among these tokens of the prompt's last one; negative when it lies before them."""
        if self.request.prompt is not None:
            return self.request.prompt - 1
        if cache is None:
            return self.shape[1] - 1
        if self.past == 0 or cache.decided is None:
            cache.decided = self.past + self.shape[1] - 1
        return cache.decided - self.past

    def _prompt_plan(self) -> int:
        """Tokens at the start that share one plan."""
        if self.settings.prompt_plan != "shared":
            return 0
        if self.request.prompt is not None:
            return self.request.prompt
        # Where one plan is for a whole input, a cache in which nothing was decided yet holds the prompt's beginning.
        undecided = self.settings.reroute_every is None and self.cache is not None and self.cache.decided is None
        return self.shape[1] if self.shape[1] > 1 and (self.past == 0 or undecided) else 0

    def _take(self, runs: Tensor) -> None:
        """Hold a plan (B, T, L)."""
        self._runs = runs = self._completed(runs)
        counts = runs.sum(1).t().tolist()  # (L, B); the layers need them on the host
        self._set_active_rows([row_summary(each, self.shape[1]) for each in counts])

    def _completed(self, runs: Tensor) -> Tensor:
        """A plan (B, T, …) with full depth for sinks, where padding follows its row if the row is whole."""
        if self.settings.sink_tokens:
            runs = runs | self.sinks()[..., None]
        if self.valid is not None and not bool(self.valid.all()):
            padding = ~self.valid[..., None]
            runs = torch.where(padding, (runs | padding).all(1, keepdim=True), runs)
        return runs

    def _take_on_host(self, scores: Tensor) -> None:
        """The same for one new token a row, without tensors: top-k of R numbers is quicker in Python."""
        asked, first, rows = self.request.executed, self.context_layer, len(scores)
        on: list[list[Any]] = [[True] * rows for _ in range(self.settings.layers)]
        for row, values in enumerate(scores[:, 0].tolist()):
            k = asked[row if len(asked) > 1 else 0] - first - 1
            order = sorted(range(len(values)), key=values.__getitem__, reverse=True)  # stable, so ties by index
            for index in order[k:]:
                on[first + index][row] = False
        self._rows_on = on
        self._set_active_rows([row[0] for row in on] if rows == 1 else [row_summary(row, 1) for row in on])

    def _set_active_rows(self, who: list[bool | list[int]]) -> None:
        first = self.context_layer
        self.active_rows[first:] = [None] * (len(who) - first) if self.compute_all_layers else who[first:]


def row_summary(counts: list[int], most: int) -> bool | list[int]:
    """True where every row's count is `most`, False where each is 0, else the counts."""
    return True if min(counts) == most else counts if max(counts) else False
