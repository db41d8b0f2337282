"""`RoutedLM`: a frozen language model whose layers run by plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from buddy.backbone.load import Backbone, load_backbone
from buddy.budget import Budget, Table, auto_cap, executed_layers
from buddy.engine.bridges import Bridges
from buddy.engine.forward import BatchPlan, PoolKind, PromptPlan, Request, Settings
from buddy.engine.hooks import ForwardHooks
from buddy.engine.record import Output, Record
from buddy.errors import BuddyError, BudgetError, DataError
from buddy.plan import Plan, hold_scores, top_k
from buddy.registry import build
from buddy.router import AnyRouter, Context, Geometry, LayerwiseRouter

Choose = Callable[[Context], Tensor]  # contexts of prompts (B,) → K (B,) long


def geometry_of(backbone: Backbone, context_layer: int = 1, pool: PoolKind = "value") -> Geometry:
    """The sizes that a router for this backbone needs."""
    features = backbone.kv_size * (2 if pool == "both" else 1)
    return Geometry(
        layers=backbone.num_layers, context_layer=context_layer, hidden=backbone.hidden_size, features=features
    )


class RoutedLM(nn.Module):
    """A backbone and a router; the backbone's own `forward` and `generate` obey the budget set by `at`.

    Args:
        backbone: a frozen model; its layers are made skippable in place until `detach`. An older model on the same
            backbone is detached from it.
        router: scores its routable layers, or decides on one after the other.
        pool: which of the context layer's cached states are pooled.
        sink_tokens: first positions of every row at full depth (attention sinks, 2309.17453), counted apart.
        prompt_plan: "token" plans for each prompt token, "shared" gives the whole prompt its last token's plan.
        policy: what a layer's cache holds for tokens that skipped it: "fill", "hole" or "zero".
        reroute_every: tokens between decisions while decoding; None keeps the prompt's last plan. A router whose
            `scope` is "prompt" has the shared prompt plan and None whatever is given here.
        batch_plan: "row" plans for each row, "shared" makes one plan for the batch from the mean score. Training and
            the fit of bridges plan for each row whatever is given here: their rows have nothing in common.
        mean_over: 1 runs exactly K layers for each token. W > 1 runs K in the mean over about W tokens of a row: the
            scores of a token compete with those of the W − 1 tokens before it (`counts_over`). Scores that plan for
            several tokens or rows run exactly K whatever is given here. The gates of a layerwise router decide alone
            with W > 1, and its training is what keeps their mean near K.

    In generation the first forward is the prompt. Where the prompt comes in chunks, only the first chunk shares a plan,
    and decisions are counted from its last token.
    Assisted generation, which takes tokens back, needs `reroute_every` 1, `mean_over` 1, `prompt_plan` "token" and
    another budget than "auto"; with sliding windows also another policy than "hole".

    Attributes:
        table: called with this model, and with the number of rows where it is not one, gives the milliseconds that a
            token takes at each K; without it latencies are refused as budgets.
        chooser: takes the most layers that "auto" may choose and gives the function that chooses; None without a
            budget predictor.
        adapter: a LoRA adapter on the backbone, or None. It is active at every budget, full depth included; `dense`,
            `stock` and a forward without a plan leave it out.
        bridges: what tokens pass through in place of the layers that they skip, or None; see `bridge`.

    Raises:
        BuddyError: an option has another value than these, the router is of an unknown scope, or an older model on this
            backbone is within a block of `at`.
    """

    def __init__(
        self,
        backbone: Backbone,
        router: AnyRouter,
        *,
        pool: PoolKind = "value",
        sink_tokens: int = 1,
        prompt_plan: PromptPlan = "token",
        policy: str = "fill",
        reroute_every: int | None = 1,
        batch_plan: BatchPlan = "row",
        mean_over: int = 1,
    ) -> None:
        super().__init__()
        self.router, self.geometry = router.to(backbone.device), router.geometry
        settings = Settings(
            layers=self.geometry.layers,
            context_layer=self.geometry.context_layer,
            pool=pool,
            policy=policy,
            sink_tokens=sink_tokens,
            prompt_plan=prompt_plan,
            batch_plan=batch_plan,
            reroute_every=reroute_every,
            mean_over=mean_over,
        )
        self._own_settings, self.settings = settings, settings.for_router(router)
        self._backbone = (backbone,)  # in a tuple: the frozen backbone is not part of this module's state
        self._hooks = ForwardHooks(self)
        self.table: Callable[..., Table] | None = None
        self.chooser: Callable[[int], Choose] | None = None
        self.adapter: Any | None = None
        self.bridges: Bridges | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        router: str = "buddy",
        *,
        context_layer: int = 1,
        router_options: Mapping[str, Any] | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        accept_license: bool = False,
        pool: PoolKind = "value",
        **options: Any,
    ) -> RoutedLM:
        """A backbone with a new router, which is neither calibrated nor trained yet; `RoutingModule` does both.

        Args:
            name: an embedded model, a folder in the hub's layout, or a name on the hub.
            router: an installed router, or "my_module:MyRouter".
            context_layer: layers that run before the plan is made.
            router_options: keyword arguments of the router's class.
            dtype: of the backbone, as for `load_backbone`; the router stays in float32.
            revision: branch, tag or commit on the hub.
            trust_remote_code: whether code that comes with the model may run.
            accept_license: accept the licence of an embedded model that asks for it.
            pool: which of the context layer's cached states are pooled.
            options: the other keyword arguments of `RoutedLM`.

        Raises:
            BuddyError: the model cannot be loaded or routed, or the router cannot be made.
        """
        backbone = load_backbone(
            name, dtype, revision=revision, trust_remote_code=trust_remote_code, accept_license=accept_license
        )
        geometry = geometry_of(backbone, context_layer, pool)
        return cls(backbone, build(router, geometry, router_options or {}), pool=pool, **options)

    @property
    def backbone(self) -> Backbone:
        """The frozen model, with its tokenizer."""
        return self._backbone[0]

    @property
    def mean_over(self) -> int:
        """Tokens over which a budget is a mean; 1 where each token runs exactly K layers."""
        gates = isinstance(self.router, LayerwiseRouter)  # decide alone, shared plans or not
        return self.settings.mean_over if gates else self.settings.competing

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer."""
        return self.backbone.tokenizer

    @property
    def sink_tokens(self) -> int:
        """First positions of every row at full depth."""
        return self.settings.sink_tokens

    def detach(self) -> None:
        """Give the stock model back, class by class and hook by hook, without an adapter.

        Raises:
            BuddyError: called within a block of `at`.
        """
        self._hooks.remove()
        if self.adapter is not None:
            self.adapter.remove()
            self.adapter = None

    def merge(self) -> None:
        """Add the adapter, if there is one, to the backbone's weights; the stock model cannot be restored."""
        if self.adapter is not None:
            self.adapter.merge()
            self.adapter = None

    def bridge(self, bridges: Bridges | None) -> None:
        """Pass tokens through these bridges, frozen, where they skip layers; None takes them off."""
        self.bridges = None if bridges is None else bridges.to(self.backbone.device).freeze(self.backbone.dtype)

    @contextmanager
    def stock(self) -> Iterator[None]:
        """Within this block the backbone is the stock model: no layer is skipped, and an adapter is off."""
        with self._hooks.requested(None), self.unadapted():
            yield

    def executed_layers(self, budget: Budget) -> int:
        """K for a budget of this model.

        Raises:
            BudgetError: out of range, less than full depth from a router that runs every layer, or "auto", which is
                for `at` and `choosing`.
        """
        table = self.table
        measured = None if table is None else (lambda: table(self))
        count = executed_layers(budget, self.geometry.layers, self.geometry.always_on, measured)
        if self.router.full_depth and count < self.geometry.layers:
            raise BudgetError(
                f"This router runs every layer; ask for budget 1.0 instead of {budget}, or another router."
            )
        return count

    @contextmanager
    def changed(self, router: AnyRouter | None = None, **settings: Any) -> Iterator[None]:
        """Within this block other `Settings` hold, such as prompt_plan="shared", or another router plans.

        Args:
            router: of the same geometry; a cache belongs to the router that began it.
            settings: in place of those that hold now, or with another router of the model's own.

        Raises:
            BuddyError: a setting of another value than `RoutedLM` takes, or a router of an unknown scope.
        """
        before = self.router, self.settings
        if router is not None:
            self.router, self.settings = router, self._own_settings
        try:
            self.settings = replace(self.settings, **settings).for_router(self.router)
            yield
        finally:
            self.router, self.settings = before

    @contextmanager
    def at(self, *budgets: Budget, executed: Sequence[int] | None = None) -> Iterator[Record]:
        """Within this block the backbone's `forward` and `generate` spend the given budget.

        Where one plan or choice holds for a prompt, `generate` needs its cache: with use_cache=False each step is a new
        prompt.

        Args:
            budgets: one for the whole batch or one per row; "auto" alone makes the budget predictor choose for each
                row, at the last token of the first forward.
            executed: K in place of budgets.

        Raises:
            BudgetError: a budget out of range, or "auto" without a budget predictor.
        """
        wanted = budgets if executed is None else [f"{count}layers" for count in executed]
        if not wanted:
            raise BudgetError("No budget was given; give one for all rows, or one per row.")
        with self._hooks.requested(self._request(wanted)) as record:
            yield record

    @torch.no_grad()
    def generate(self, prompt: str, **options: Any) -> str:
        """The continuation of a text, without special tokens, at the budget set by `at`, or at full depth.

        Args:
            prompt: text to continue.
            options: of transformers' `generate`, such as max_new_tokens or do_sample. Without a `generation_config` it
                is greedy, and without a `max_length` either it writes 64 tokens at most.

        Raises:
            DataError: the prompt is not one text, or empty.
            BuddyError: options that give more than one text; `model.backbone.model.generate` has them, under `at` too.
        """
        if not isinstance(prompt, str):
            raise DataError(f"The prompt is {type(prompt).__name__}; give one text.")
        config = options.get("generation_config")
        given = options if config is None else {**config.to_dict(), **options}
        if given.get("return_dict_in_generate") or (given.get("num_return_sequences") or 1) > 1:
            raise BuddyError(
                "This gives one text alone; for num_return_sequences and return_dict_in_generate call "
                "model.backbone.model.generate with token ids."
            )
        tokens = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.backbone.device)
        if not tokens["input_ids"].numel():
            raise DataError("The prompt is empty; give some text to continue.")
        limit = {} if "max_length" in options else {"max_new_tokens": 64}
        defaults = {"do_sample": False, **limit} if config is None else {}
        options = {"pad_token_id": self.tokenizer.pad_token_id, **defaults, **options}
        written = self.backbone.model.generate(**tokens, **options)
        return self.tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    def choosing(self, budget: str) -> Choose:
        """The function from contexts (B,) of prompts to K (B,), for "auto" or, with a cap, "auto:0.75".

        Raises:
            BudgetError: no budget predictor, or a cap below all that it can choose.
        """
        if self.chooser is None:
            raise BudgetError(
                "This run has no budget predictor; fit one with `buddy fit … predictor.name=regress`, or ask for a "
                "fraction such as 0.75."
            )
        return self.chooser(self.executed_layers(auto_cap(budget)))

    @torch.no_grad()
    def context(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Context:
        """What a router sees at the last token of each row, (B,); the layers after the context layer are not computed.

        Args:
            input_ids: (B, T) long, padded on the left where rows differ.
            attention_mask: (B, T), 0 for padding.
            position_ids: (B, T) long, as the backbone takes them.
        """
        runs = torch.ones(*input_ids.shape, self.geometry.layers, dtype=torch.bool, device=input_ids.device)
        runs[..., self.geometry.context_layer :] = False
        with self.changed(sink_tokens=0), self._hooks.requested(Request(runs=runs, prompt=0)):
            positions = self._positions(attention_mask) if position_ids is None else {"position_ids": position_ids}
            self.backbone.base(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions)
            context = self._hooks.take_last().context
        return context[:, -1]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        executed: Tensor | None = None,
        runs: Tensor | None = None,
        gates: Tensor | None = None,
        prompt: int = 0,
        logits_to_keep: Tensor | int = 0,
        gate_weighted: bool = False,
    ) -> Output:
        """The parallel form: every token routed on its own prefix, as step-by-step decoding would.

        Args:
            input_ids: (B, T) long.
            attention_mask: (B, T), 0 for padding.
            executed: (B,) long, K per row; None with `runs` None means the stock model: full depth, an adapter off.
            runs: (B, T, L) bool, a plan to run instead of the router's.
            gates: (B, T, L) with gradients for straight-through training, of the plan `runs`.
            prompt: tokens at the start that share one plan where `prompt_plan` is "shared".
            logits_to_keep: positions whose logits are wanted, as transformers' argument of that name; 0 for all.
            gate_weighted: multiply what each layer adds by the weight of a layerwise router's gate, with gradients.
                Every layer is computed on every token, so the cache policy does not matter.

        Raises:
            BuddyError: `gates` without `runs`, or under a policy other than "fill"; `gate_weighted` without a layerwise
                router.
        """
        if gates is not None and runs is None:
            raise BuddyError("Gates need the plan that they belong to; give runs, too.")
        if gates is not None and self.settings.policy != "fill":
            raise BuddyError(
                f"Computing every layer, as back-propagating estimators do, needs the policy 'fill', not "
                f"{self.settings.policy!r}; choose that, or the perturbed estimator."
            )
        if gate_weighted and not isinstance(self.router, LayerwiseRouter):
            raise BuddyError(f"{type(self.router).__name__} has no gates to weigh layers by; a LayerwiseRouter has.")
        counts = None if executed is None else tuple(executed.tolist())
        adapted = nullcontext() if executed is not None or runs is not None else self.unadapted()
        with adapted, self._hooks.requested(Request(counts, runs, gates, prompt, gate_weighted)):
            options = {
                "attention_mask": attention_mask,
                **self._positions(attention_mask),
                "logits_to_keep": logits_to_keep,
            }
            logits = self.backbone.model(input_ids=input_ids, use_cache=False, **options).logits
            done = self._hooks.take_last()
        record = done.record()
        weights = torch.stack(done.weights, -1) if gate_weighted and done.weights else None
        return Output(logits, done.context, done.scores, record.runs, record.executed, record.sinks, weights)

    def plan(self, scores: Tensor, executed: Tensor, prompt: int = 0) -> Tensor:
        """(B, T, L) bool: the plan for scores (B, T, R) and K per row (B,), to be given to `forward` as `runs`.

        Where a budget is a mean over tokens, all tokens of the window compete but the sinks, for training. If they
        competed only with earlier ones, a router would learn scores that rise from token to token, and win more layers
        than asked for.
        """
        (rows, tokens, routable), sinks = scores.shape, self.sink_tokens
        counts = executed[:, None].expand(rows, tokens)
        if self.settings.competing > 1:
            k = executed - self.geometry.always_on
            by_layer = scores[:, sinks:].transpose(1, 2)  # ties go to the lower layer, then to the earlier token
            runs = top_k(by_layer.flatten(1), k * (tokens - sinks)).view(rows, routable, -1)
            counts = F.pad(runs.sum(1), (sinks, 0)) + self.geometry.always_on
        return Plan.from_scores(self.held(scores, prompt), counts, self.geometry.layers).runs

    def held(self, scores: Tensor, prompt: int = 0) -> Tensor:
        """Scores (B, T, R) that decide for each token under `reroute_every` and `prompt_plan`, from its own scores."""
        shared = prompt if self.settings.prompt_plan == "shared" else 0
        return hold_scores(scores, prompt - 1, self.settings.reroute_every, shared)

    @torch.no_grad()
    def dense(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, logits_to_keep: Tensor | int = 0
    ) -> Tensor:
        """Logits (B, T', V) of the stock model, routing and adapter left out."""
        with self.stock():
            return self.backbone.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=logits_to_keep
            ).logits

    def _positions(self, mask: Tensor | None) -> dict[str, Tensor]:
        """`position_ids` of padded rows as in decoding, where the router sees rotated keys; else the stock call."""
        if mask is None or self.settings.pool == "value":
            return {}
        return {"position_ids": (mask.long().cumsum(-1) - 1).clamp(min=0)}

    def unadapted(self) -> AbstractContextManager[None]:
        """Within this block Buddy's adapter, if there is one, is off."""
        return nullcontext() if self.adapter is None else self.adapter.off()

    def _request(self, budgets: Sequence[Budget]) -> Request:
        """The request for budgets."""
        auto = [budget for budget in budgets if auto_cap(budget)]
        if not auto:
            return Request(executed=tuple(self.executed_layers(each) for each in budgets))
        if len(budgets) > 1:
            raise BudgetError("The budget auto chooses for each row; give it alone, or one number for each row.")
        return Request(choose=self.choosing(str(auto[0])))
