"""Time and work by budget: prefill and decode of routed, dense and physically pruned models, taken in turn."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import DynamicCache, PreTrainedModel

from buddy.console import Track
from buddy.engine.kv_cache import growing_layer
from buddy.engine.model import RoutedLM
from buddy.engine.record import Record
from buddy.engine.shared_weights import pruned_model

PROMPT, STEPS = 64, 32  # tokens before the decode steps that are timed, and their number


@dataclass
class Timings:
    """What one case takes.

    Attributes:
        rounds: milliseconds, one entry a round, by the name of a prompt or of a decoding, the mean of its steps.
        executed: layers that a token of a decoding's steps ran on average, by name.
        cache_bytes: size of the cache after the longest prompt.
        flops: floating-point operations of that prompt, in "total" and "without_head".
    """

    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    executed: dict[str, float] = field(default_factory=dict)
    cache_bytes: int = 0
    flops: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkCase:
    """A model and the context in which it runs.

    Attributes:
        name: "dense", "full" (the engine at full depth), "routed", "shared" (routed, one plan for the prompt) or
            "pruned".
        layers: K.
        model: that is timed.
        context: opens its context; gives what ran within it where the model is routed.
        decodes: whether its decoding is timed too.
    """

    name: str
    layers: int
    model: PreTrainedModel
    context: Callable[[], AbstractContextManager[Record | None]]
    decodes: bool = True

    def prefill(self, ids: Tensor) -> Any:
        """The cache after a prompt (B, T)."""
        return self.model(ids, cache=self._cache(), use_cache=True, logits_to_keep=1).cache

    def step(self, ids: Tensor, cache: Any) -> float:
        """Milliseconds of one step on (B, 1)."""
        return milliseconds(partial(self.model, ids, cache=cache, use_cache=True), ids.device)

    def _cache(self) -> DynamicCache | None:
        """For a stock model an empty cache that grows like the engine's; the engine makes its own."""
        if self.context is not nullcontext:
            return None
        cache = DynamicCache(config=self.model.config)
        cache.layers[:] = [growing_layer(layer) for layer in cache.layers]
        return cache


def benchmark_cases(routed: RoutedLM, counts: Sequence[int], ids: Tensor) -> list[BenchmarkCase]:
    """Dense and full once; routed, shared and pruned for each K below L, pruned to the router's commonest layers."""
    model, layers = routed.backbone.model, routed.geometry.layers
    found = [
        BenchmarkCase("dense", layers, pruned_model(model, range(layers)), nullcontext),
        BenchmarkCase("full", layers, model, partial(routed.at, executed=[layers])),
    ]
    for count in counts:
        kept = commonest_layers(routed, ids[:1], count)
        found.append(BenchmarkCase("routed", count, model, partial(routed.at, executed=[count])))
        found.append(BenchmarkCase("shared", count, model, partial(_shared, routed, count), decodes=False))
        found.append(BenchmarkCase("pruned", count, pruned_model(model, kept), nullcontext))
    return found


def commonest_layers(routed: RoutedLM, ids: Tensor, count: int) -> list[int]:
    """The `count` layers, rising, that most tokens (1, T) run at that K."""
    runs = routed(ids, executed=torch.tensor([count])).runs[0].sum(0)
    return sorted(runs.argsort(descending=True, stable=True)[:count].tolist())


@contextmanager
def _shared(routed: RoutedLM, count: int) -> Iterator[Record]:
    with routed.changed(prompt_plan="shared"), routed.at(executed=[count]) as record:
        yield record


@torch.inference_mode()
def time_interleaved(
    cases: Sequence[BenchmarkCase],
    prompts: Mapping[str, Tensor],
    decodings: Mapping[str, Tensor],
    *,
    rounds: int,
    track: Track = iter,
) -> dict[tuple[str, int], Timings]:
    """Timings by (name, layers).

    Args:
        cases: what to time; each runs once a round, in random order.
        prompts: (1, T) long by name, whose prefill is timed.
        decodings: (B, T) long by name, whose last `STEPS` tokens are decoded after all before them.
        rounds: how many, after one that is not counted.
        track: wraps the rounds to show progress.
    """
    timings = {(each.name, each.layers): Timings() for each in cases}
    decoding, draw = [each for each in cases if each.decodes], random.Random(0)
    for _ in track(range(rounds + 1)):
        for each in draw.sample(cases, len(cases)):
            with each.context():
                for name, ids in prompts.items():
                    spent = milliseconds(partial(each.prefill, ids), ids.device)
                    timings[each.name, each.layers].rounds[name].append(spent)
        for name, ids in decodings.items():
            steps = decode_interleaved(decoding, ids, ids.shape[1] - STEPS, draw)
            for each, means in zip(decoding, steps, strict=True):
                mine = timings[each.name, each.layers]
                mine.rounds[name].append(means.milliseconds)
                mine.executed[name] = means.executed
    for each in cases:
        mine = timings[each.name, each.layers]
        mine.rounds = {name: spent[1:] for name, spent in mine.rounds.items()}
        _count_work(each, max(prompts.values(), key=Tensor.numel), mine)
    return timings


class StepMeans(NamedTuple):
    """Means over the decode steps of one case: milliseconds per step, and layers that a token ran."""

    milliseconds: float
    executed: float


def decode_interleaved(
    cases: Sequence[BenchmarkCase], ids: Tensor, prompt: int, draw: random.Random
) -> list[StepMeans]:
    """What a step of each case takes, over the tokens after the first `prompt` of (B, T).

    All take one token before any takes the next, so that a short disturbance of the machine affects all of them; the
    order is drawn for each token.
    """
    caches = []
    for each in cases:
        with each.context():
            caches.append(each.prefill(ids[:, :prompt]))
    spent, ran = [0.0] * len(caches), [0.0] * len(caches)
    for at in range(prompt, ids.shape[1]):
        for place in draw.sample(range(len(cases)), len(cases)):
            each = cases[place]
            with each.context() as record:
                spent[place] += each.step(ids[:, at : at + 1], caches[place])
            ran[place] += each.layers if record is None else record.executed[-1].float().mean().item()
    steps = ids.shape[1] - prompt
    return [StepMeans(total / steps, layers / steps) for total, layers in zip(spent, ran, strict=True)]


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one call, with all that it started on the device."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)


def _count_work(case: BenchmarkCase, ids: Tensor, timings: Timings) -> None:
    """Floating-point operations of a prefill, with and without the head, and bytes of the cache it leaves."""

    def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    flash = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    with case.context(), FlopCounterMode(display=False, custom_mapping={flash: attention_flops}) as counter:
        cache = case.prefill(ids)
    head = 2 * case.model.lm_head.weight.numel()
    timings.flops = {"total": counter.get_total_flops(), "without_head": counter.get_total_flops() - head}
    timings.cache_bytes = cache_bytes(cache)


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds: keys, values and, once each, the hidden states that wait in a routed one."""
    names = ("keys", "values", "slots", "valid")  # the last two where a layer has only some tokens
    held = [x for layer in cache.layers for name in names if (x := getattr(layer, name, None)) is not None]
    pending = [hidden for layer in cache.layers for hidden, _ in getattr(layer, "pending", ())]
    waiting = {hidden.data_ptr(): hidden for hidden in pending}
    return sum(x.numel() * x.element_size() for x in (*held, *waiting.values()))


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
