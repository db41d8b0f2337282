"""What hosts a routed model: hooks by which each forward of the backbone runs under the request that holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import DynamicCache

from buddy.engine.forward import Record, Request, RoutedForward, checked_mask, for_rows, wants_cache
from buddy.engine.kv_cache import Pool, RoutedCache, adopt
from buddy.engine.layers import Seat, attach, detach, probes
from buddy.engine.layerwise import LayerwiseForward
from buddy.engine.sinks import SinkMemory, SinkStates
from buddy.errors import BuddyError, BudgetError
from buddy.router import LayerwiseRouter

if TYPE_CHECKING:
    from buddy.engine.model import RoutedLM


class ForwardHooks:
    """Makes a pass for each forward of the backbone's decoder, and keeps what ran.

    Args:
        routed: the model; its router and settings hold as they are at each forward.

    Attributes:
        sinks: remembered attention sinks.
    """

    def __init__(self, routed: RoutedLM) -> None:
        backbone = routed.backbone
        self._routed, self._seat = routed, Seat(routed.policy)
        self._request: Request | None = None
        self._record: Record | None = None
        self._last: Any = None
        self.sinks = SinkMemory(backbone.base)
        attach(backbone.layers, self._seat, probes(backbone))
        self._handles = [
            backbone.base.register_forward_pre_hook(self._begin, with_kwargs=True),
            backbone.base.register_forward_hook(self._end, always_call=True),
        ]

    def leave(self) -> None:
        """Give the stock classes back, and take the hooks off."""
        for hook in self._handles:
            hook.remove()
        detach(self._routed.backbone.layers)

    @contextmanager
    def requested(self, request: Request | None) -> Iterator[Record]:
        """Within this block forwards run under a request; None leaves the model stock."""
        before = self._request, self._record
        self._request, self._record = request, Record()
        try:
            yield self._record
        finally:
            self._request, self._record = before

    def taken(self) -> Any:
        """The pass of the last forward that was not generation's; it is not kept any longer."""
        done, self._last = self._last, None
        return done

    def _begin(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the decoder runs: a fresh pass for the request that holds, or none."""
        self._seat.current = None
        cache, request = kwargs.get("cache"), self._request
        if request is None:
            if not isinstance(cache, RoutedCache):
                return None
            request = Request()  # a cache that was routed before goes on as one, at full depth
        if self._routed.backbone.layers[0]._seat[0] is not self._seat:
            raise BuddyError(
                "Another router was attached to this backbone since; detach that one, and attach this anew."
            )
        if args:
            kwargs["input_ids"] = args[0]
        tokens = kwargs.get("input_ids")
        shape = tuple((kwargs["inputs_embeds"] if tokens is None else tokens).shape[:2])
        mask = checked_mask(kwargs.get("attention_mask"))
        if cache is None and wants_cache(base.config, kwargs):
            cache = kwargs["cache"] = DynamicCache(config=base.config)
        past = self._adopt(cache, mask)
        if request.choose is not None and (request.executed is None or not past):
            request = self._chosen(request, kwargs, cache if past else None)
        if request.executed is not None:
            request = for_rows(request, shape[0])
        current = self._pass(request, shape, past, mask, cache)
        if tokens is not None:
            current.remember = lambda count: self.sink_states(tokens[:, :count], kwargs.get("position_ids"))
        self._seat.current = current
        return (), kwargs

    def _adopt(self, cache: Any, mask: Tensor | None) -> int:
        """Make a cache fit for routing; how many positions it holds already."""
        if cache is None:
            return 0
        routed, context = self._routed, self._routed.geometry.context_layer - 1
        past = cache.get_seq_length(context)
        adopt(
            cache,
            layers=routed.geometry.layers,
            context=context,
            kind=routed.pool,
            policy=routed.policy.name,
            model=routed.backbone.fingerprint,
            valid=None if mask is None or not past else mask[:, :past].bool(),
        )
        return past

    def _pass(
        self, request: Request, shape: tuple[int, int], past: int, mask: Tensor | None, cache: Any
    ) -> RoutedForward:
        routed = self._routed
        rest = request, shape, past, mask, cache, Pool(routed.pool) if cache is None else cache.pool
        if isinstance(routed.router, LayerwiseRouter):
            return LayerwiseForward(routed.settings, routed.router, *rest)
        return RoutedForward(routed.settings, routed.router.score, *rest)

    def _chosen(self, request: Request, kwargs: dict[str, Any], before: RoutedCache | None) -> Request:
        """The request with K for each row as the budget predictor chooses; it holds for the forwards that follow.

        Args:
            request: of this forward.
            kwargs: of the decoder.
            before: what was read in an earlier block, if anything; it is left as it is.
        """
        if kwargs.get("input_ids") is None:
            raise BudgetError("The budget auto needs tokens, not embeddings; ask for a fraction such as 0.75.")
        places = {name: kwargs[name] for name in ("attention_mask", "position_ids") if kwargs.get(name) is not None}
        seen = self._routed.context(kwargs["input_ids"], cache=copy.deepcopy(before), **places)
        executed = tuple(request.choose(seen).tolist())
        self._request = replace(request, executed=executed)
        self._record.auto_executed = executed
        return self._request

    def sink_states(self, ids: Tensor, positions: Tensor | None) -> SinkStates | None:
        """What the beginnings ids (B, s) become, whatever pass is under way; None at other positions than the first."""
        current = self._seat.current
        try:
            with self.requested(None):
                return self.sinks.states(ids, positions)
        finally:
            self._seat.current = current

    def _end(self, *_: Any) -> None:
        done, self._seat.current = self._seat.current, None
        if done is None or done.context is None:
            return
        if self._record is not None:
            self._record.forwards.append(done.ran())
            self._last = done if self._request.prompt is not None else None
