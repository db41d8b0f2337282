"""`CalibrationProbe`: the implementation of `buddy.router.Probe`, the measurements for a router's calibration."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from torch import Tensor

from buddy.backbone.adapter import adapter_state
from buddy.backbone.load import sampled
from buddy.calibration.bridges import PlanBridges
from buddy.calibration.measures import Pair, PlanLosses, similarities, taylor_importance
from buddy.engine.model import RoutedLM
from buddy.errors import BackboneError
from buddy.measurements import Measurements, digest, tensor_bytes
from buddy.router import Context, Criterion

Track = Callable[[Sequence[Any], str], Iterable[Any]]  # as `buddy.console.track`, which takes a description, too
SIMILARITIES = ("block influence", "angular distance")
TAYLOR = "Taylor importance"
LAYOUT = 1  # raise it when values are measured differently: older ones are then not found
BRIDGE_WINDOWS = 24  # at most, the last ones: a search measures on the first


class CalibrationProbe:
    """Measures a frozen model on calibration windows; `buddy.router.Probe` describes the methods.

    Args:
        routed: the model; its router is not used.
        windows: (N, W) long, calibration tokens.
        batch_size: windows per forward.
        track: wraps a loop to show progress, given its items and a description; None shows nothing.
        layer_counts: executed layers K of the budgets.
        seed: for routers whose search draws random numbers.
        prompt: first tokens of a window, its prompt; half of the window by default.
        store: folder of the measured values, so that an interrupted search resumes; None keeps them in memory only.
        bridge: rank and ridge of the bridges in skipped layers; None where the recipe has none.
        measured: values of another probe with the same backbone, routing and windows, to share; None to begin anew.

    Attributes:
        routed: the model.
        measured: the values so far.
        geometry, layer_counts, seed, count, bridge_windows, prompt, windows, model: see `buddy.router.Probe`.
    """

    def __init__(
        self,
        routed: RoutedLM,
        windows: Tensor,
        batch_size: int = 4,
        track: Track | None = None,
        *,
        layer_counts: Iterable[int] = (),
        seed: int = 0,
        prompt: int | None = None,
        store: Path | None = None,
        bridge: Mapping[str, Any] | None = None,
        measured: Measurements | None = None,
    ) -> None:
        self.routed, self.geometry = routed, routed.geometry
        self.layer_counts = tuple(sorted({k for k in layer_counts if k < self.geometry.layers}, reverse=True))
        self.seed, self.count = seed, len(windows)
        self.bridge_windows = 0 if bridge is None else max(1, min(BRIDGE_WINDOWS, self.count * 3 // 4))
        self.prompt = windows.shape[1] // 2 if prompt is None else prompt
        self.windows, self._size, self.model = windows, batch_size, routed.backbone.model
        self._batches = windows.split(batch_size)
        setting = None if store is None else measurement_setting(routed, windows, batch_size)
        self.measured = Measurements(store, setting) if measured is None else measured
        self._losses: dict[bool, PlanLosses] = {}  # without and with bridges
        self._bridge = bridge
        self._track, self._tracking = track, False

    def track(self, items: Sequence[Any], words: str) -> Iterator[Any]:
        """See `Probe.track`."""
        if self._track is None or self._tracking or not items:
            yield from items
            return
        self._tracking = True
        try:
            yield from self._track(items, words)
        finally:
            self._tracking = False

    def losses(
        self,
        runs: Tensor,
        criterion: Criterion = "ce",
        windows: int | Sequence[int] | None = None,
        *,
        bridged: bool = False,
        what: str | None = None,
    ) -> Tensor:
        """See `Probe.losses`."""
        self._check(runs, criterion, windows)
        # A part of the stored key: name the way of fitting anew when it changes.
        fitted = f" bridges of relative errors of {self.bridge_windows} windows {self._bridge}"
        how = fitted if bridged and self._bridge is not None else ""
        windows = self.count if windows is None else windows
        if isinstance(windows, int):  # in whole batches, so that a loss does not depend on how many are asked for
            count, windows = windows, range(min(-(-windows // self._size) * self._size, self.count))
        else:
            count = len(windows)
        batches = [tuple(windows[at : at + self._size]) for at in range(0, len(windows), self._size)]
        plans = ["".join("01"[on] for on in plan) for plan in runs.tolist()]
        wanted = {
            f"{criterion} {b} {plan}{how}": (b, plan) for b in batches for plan in sorted(set(plans), reverse=True)
        }
        missing = [wanted[key] for key in self.measured.missing(wanted)]
        if missing:
            number = len({plan for _, plan in missing})
            self._measure(missing, criterion, how, what or f"losses of {number} plan{'s' if number > 1 else ''}")
        rows = [torch.cat([self.measured[f"{criterion} {b} {plan}{how}"] for b in batches])[:count] for plan in plans]
        return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.float64)

    def plan_without(self, removed: Iterable[int]) -> Tensor:
        """See `Probe.plan_without`."""
        runs = torch.ones(self.geometry.layers, dtype=torch.bool)
        runs[[self.geometry.context_layer + index for index in removed]] = False
        return runs

    @property
    def block_influence(self) -> Tensor:
        """See `Probe.block_influence`."""
        return self._similarity(SIMILARITIES[0])

    @property
    def angular_distance(self) -> Tensor:
        """See `Probe.angular_distance`."""
        return self._similarity(SIMILARITIES[1])

    @property
    def loss_increase(self) -> Tensor:
        """See `Probe.loss_increase`."""
        plans = [self.plan_without(removed) for removed in ([], *([i] for i in range(self.geometry.routable)))]
        perplexity = self.losses(torch.stack(plans), what="perplexity without a layer").mean(1).exp()
        return (perplexity[1:] - perplexity[0]).float()

    @property
    def taylor(self) -> Tensor:
        """See `Probe.taylor`."""
        first = self.geometry.context_layer
        if self.measured.missing([TAYLOR]):
            layers, batches = range(first, first + self.geometry.routable), self.track(self._batches, TAYLOR)
            self.measured[TAYLOR] = taylor_importance(self.routed.backbone, batches, layers, self.count)
            self.measured.save()
        return self.measured[TAYLOR].clone()  # the caller may change the result

    @torch.no_grad()
    def contexts(self) -> Context:
        """See `Probe.contexts`."""
        seen = []
        for batch in self.track(self._batches, "contexts of the prompts"):
            seen.append(self.routed.context(batch[:, : self.prompt].to(self.routed.backbone.device)))
        return Context(*(torch.cat([getattr(each, field.name) for each in seen]) for field in fields(Context)))

    def _similarity(self, name: str) -> Tensor:
        """Block Influence or the angular distances; one pass measures both."""
        if self.measured.missing(SIMILARITIES):
            first, batches = self.geometry.context_layer, self.track(self._batches, " and ".join(SIMILARITIES))
            both = similarities(self.routed.backbone, batches, first, self.routed.sink_tokens)
            for key, values in zip(SIMILARITIES, both, strict=True):
                self.measured[key] = values
            self.measured.save()
        return self.measured[name].clone()

    def _measure(self, missing: Sequence[Pair], criterion: Criterion, how: str, what: str) -> None:
        losses = self._losses.get(bool(how))
        if losses is None:
            fit = PlanBridges(self.routed, self.windows[-self.bridge_windows :], **self._bridge).fit if how else None
            losses = PlanLosses(self.routed.backbone, self.windows, self._size, self.routed.sink_tokens, fit)
            self._losses[bool(how)] = losses
        try:
            for b, plan, values in losses.measure(missing, criterion, lambda pairs: self.track(pairs, what)):
                if not values.isfinite().all():
                    dtype = str(self.routed.backbone.dtype).removeprefix("torch.")
                    raise BackboneError(
                        f"The losses of {self.routed.backbone.name} in {dtype} on calibration windows are not finite; "
                        "set backbone.dtype=float32, or bfloat16."
                    )
                self.measured[f"{criterion} {b} {plan}{how}"] = values
        finally:
            self.measured.save()

    def _check(self, runs: Tensor, criterion: str, windows: int | Sequence[int] | None) -> None:
        layers, first = self.geometry.layers, self.geometry.context_layer
        if runs.dtype != torch.bool or runs.dim() != 2 or runs.shape[1] != layers:
            raise ValueError(f"runs is {runs.dtype} {tuple(runs.shape)}; give plans (P, {layers}) of bool")
        if not (runs[:, :first].all() and runs[:, -1].all()):
            raise ValueError(f"a plan skips a layer that always runs; keep the first {first} and the last")
        if criterion not in get_args(Criterion):
            raise ValueError(f"criterion is {criterion!r}; choose one of {', '.join(get_args(Criterion))}")
        if isinstance(windows, Sequence):
            if list(windows) != sorted({*windows} & {*range(self.count)}) or not windows:
                raise ValueError(f"windows is {list(windows)}; give ascending numbers from 0 to {self.count - 1}")
        elif windows is not None and not 1 <= windows <= self.count:
            raise ValueError(
                f"windows is {windows} of {self.count} calibration windows; give min({windows}, probe.count)"
                if windows > 0
                else f"windows is {windows}; give 1 or more"
            )


def measurement_setting(routed: RoutedLM, windows: Tensor, batch_size: int) -> dict[str, Any]:
    """All that measured values depend on to the last bit; equal in every process.

    The rounding of a sum depends on the size of a batch, the number of threads and the processor's instructions too.

    Args:
        routed: the model.
        windows: (N, W) long.
        batch_size: windows per forward.
    """
    backbone = routed.backbone
    config = backbone.model.config
    adapters = "".join(map(adapter_state, backbone.model.modules()))
    described = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    return {
        "layout": LAYOUT,
        "backbone": backbone.fingerprint,
        "configuration": digest(json.dumps(described, sort_keys=True, default=str).encode()),
        "weights": digest(*(tensor_bytes(sampled(parameter)) for parameter in backbone.model.parameters())),
        "dtype": backbone.dtype,
        "attention": config._attn_implementation,
        "device": _device(backbone.device),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "windows": digest(tensor_bytes(windows)),
        "shape": tuple(windows.shape),
        "batch_size": batch_size,
        "sink_tokens": routed.sink_tokens,
        "context_layer": routed.geometry.context_layer,
        **({"adapters": digest(adapters.encode())} if adapters else {}),
    }


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
