"""Hooks by which each forward of the backbone's decoder runs under the request that holds at that moment."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from buddy.engine.forward import Request, RoutedForward
from buddy.engine.kv_cache import RoutedCache, adopt
from buddy.engine.layers import CurrentForward, attach, detach
from buddy.engine.layerwise import LayerwiseForward
from buddy.engine.record import Record
from buddy.engine.sinks import SinkMemory
from buddy.engine.transfer import to_host
from buddy.errors import BuddyError, BudgetError
from buddy.router import LayerwiseRouter


class ForwardHooks:
    """Makes a `RoutedForward` for each forward of the backbone's decoder, and keeps the records."""

    def __init__(self, routed: Any) -> None:  # a RoutedLM: its router and settings are read anew at each forward
        self._routed = routed
        self._current: CurrentForward = [None]
        self._request: Request | None = None
        self._record: Record | None = None
        self._last: Any = None
        self._sinks = SinkMemory()
        base = routed.backbone.base
        if (older := getattr(base, "_routed_by", None)) is not None:
            older.remove()
        attach(routed.backbone, self._current)
        base._routed_by = self
        self._handles = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            base.register_forward_hook(self._end, always_call=True),
            routed.backbone.model.get_output_embeddings().register_forward_pre_hook(_laid_out),
        ]

    def remove(self) -> None:
        """Take the hooks off, and give the stock classes back. After a newer model on the backbone it does nothing.

        Raises:
            BuddyError: a budget holds at this moment.
        """
        if self._request is not None:
            raise BuddyError("This model is in use at a budget; leave that block first.")
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        del self._routed.backbone.base._routed_by
        detach(self._routed.backbone.layers)

    @contextmanager
    def requested(self, request: Request | None) -> Iterator[Record]:
        """Within this block forwards run under a request; None leaves the model stock."""
        if request is not None and not self._handles:
            raise BuddyError("This model was detached, or its backbone has a newer one; make a new RoutedLM on it.")
        before = self._request, self._record
        self._request, self._record = request, Record()
        try:
            yield self._record
        finally:
            self._request, self._record = before
            self._current[0] = None  # Ctrl-C within a forward leaves it: torch then calls no hook

    def take_last(self) -> Any:
        """The last forward, if its request gave the prompt's length; it is not kept any longer."""
        done, self._last = self._last, None
        return done

    def _begin(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the decoder runs: a new `RoutedForward` for the request that holds, or none."""
        self._current[0] = None
        kwargs = dict(kwargs)
        if args:
            kwargs.update(zip(inspect.signature(base.forward).parameters, args, strict=False))
        if "past_key_values" in kwargs:  # the name of earlier versions of transformers
            kwargs.setdefault("cache", kwargs.pop("past_key_values"))
        routed, cache, request = self._routed, kwargs.get("cache"), self._request
        # A draft by the first layers (`assistant_early_exit`).
        if base.config.num_hidden_layers != routed.geometry.layers:
            return None
        if request is None:
            if not isinstance(cache, RoutedCache):
                return None
            request = Request()  # a cache that was filled under a budget continues at full depth
        tokens = kwargs.get("input_ids")
        shape = tuple((kwargs["inputs_embeds"] if tokens is None else tokens).shape[:2])
        use_cache = base.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if cache is None and use_cache:
            cache = kwargs["cache"] = DynamicCache(config=base.config)
        past = 0 if cache is None else adopt(cache, routed.settings, routed.backbone.fingerprint)
        mask = _checked_mask(kwargs.get("attention_mask"), getattr(cache, "shortest", None) is not None)
        if request.choose is not None:
            request = self._choose(request, kwargs, past)
        self._check(base, request, kwargs)
        kind = LayerwiseForward if isinstance(routed.router, LayerwiseRouter) else RoutedForward
        request = request.for_rows(shape[0])
        forward = kind(routed.settings, routed.router, request, shape, past, mask, cache, routed.bridges, tokens)
        one_plan = routed.settings.prompt_plan == "shared" or routed.router.kind == "static"
        if one_plan and tokens is not None and forward.may_share_sink():  # else other tokens run the layers, too
            forward.sink = self._sinks.states(base, tokens, kwargs.get("position_ids"))
        self._current[0] = forward
        return (), kwargs

    def _check(self, base: nn.Module, request: Request, kwargs: dict[str, Any]) -> None:
        """Refuse what only stock layers can do."""
        routed, layers = self._routed, self._routed.backbone.layers
        gated = request.gates is not None or request.gate_weighted
        skips = request.runs is not None or min(request.executed or [len(layers)]) < len(layers)
        if skips and (kwargs.get("output_attentions") or getattr(base.config, "output_attentions", False)):
            raise BudgetError("There are no attention weights below full depth; ask for budget 1.0, or leave them out.")
        if not torch.is_grad_enabled() or not base.training:
            return
        checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        if checkpointing and (gated or routed.adapter or any(weight.requires_grad for weight in base.parameters())):
            raise BuddyError("Gradient checkpointing repeats layers without their plan; turn it off, or the gradients.")

    def _choose(self, request: Request, kwargs: dict[str, Any], past: int) -> Request:
        """The request with K for each row as the budget predictor chooses; it holds for all forwards with its cache."""
        cache = kwargs.get("cache")
        if past and cache.executed is not None:
            return replace(request, executed=cache.executed)
        if past:
            raise BudgetError("The budget auto is chosen for a whole prompt; start with an empty cache.")
        if kwargs.get("input_ids") is None:
            raise BudgetError("The budget auto needs tokens, not embeddings; ask for a fraction such as 0.75.")
        names = "input_ids", "attention_mask", "position_ids"
        context = self._routed.context(*map(kwargs.get, names))
        executed = tuple(to_host(request.choose(context)))
        if isinstance(cache, RoutedCache):
            cache.executed, cache.shared = executed, True
        return replace(request, executed=executed)

    def _end(self, *_: Any) -> None:
        done, self._current[0] = self._current[0], None
        if done is None or done.context is None:
            return
        if self._record is not None:
            self._record.forwards.append(done.record())
            self._last = done if done.request.prompt is not None else None


def _laid_out(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last position's states (B, 1, D), cut out of a prompt's, with strides of their own.

    Otherwise the product copies the weights of the whole vocabulary first, once for each row.
    """
    states, *rest = args
    return (states.clone(memory_format=torch.contiguous_format) if states.shape[1] == 1 else states, *rest)


def _checked_mask(mask: Tensor | None, padded: bool) -> Tensor | None:
    """The mask (B, positions), or None where it hides nothing; `padded` says that it does hide something."""
    if mask is None:
        return None
    if mask.dim() != 2:
        raise BudgetError("Routing needs the attention mask in two dimensions (rows × tokens); pass that, or none.")
    return mask if padded or not to_host(mask.all()) else None
