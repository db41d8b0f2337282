"""Routers with one fault each, and the check that must name it."""

import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from buddy import Context, Geometry, LayerwiseRouter, Probe, Router

FAULTS: dict[type, str] = {}  # router → the only check that fails


class Sound(Router):
    """Learned: a linear map of what the token looks like; nothing is wrong with it."""

    kind = "learned"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.read = nn.Linear(geometry.hidden, geometry.routable)

    def score(self, context: Context) -> Tensor:
        return self.read(nn.functional.layer_norm(context.hidden, context.hidden.shape[-1:]))


class SoundGates(LayerwiseRouter):
    """Learned: a linear gate for each layer; nothing is wrong with it."""

    kind = "learned"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.read = nn.Parameter(torch.zeros(geometry.routable, geometry.hidden))

    def gate(self, index: int, hidden: Tensor, executed: Tensor) -> Tensor:
        return nn.functional.layer_norm(hidden, hidden.shape[-1:]) @ self.read[index]


class DropsOut(Sound):
    """Learned: leaves out some of what it reads in training; nothing is wrong with it."""

    kind = "learned"

    def score(self, context: Context) -> Tensor:
        return super().score(context) + self.read(nn.functional.dropout(context.hidden, training=self.training))


def fails(check: str) -> Callable[[type], type]:
    """Registers a router with a fault."""

    def register(cls: type) -> type:
        cls.__doc__ = "A router with a fault."
        FAULTS[cls] = check
        return cls

    return register


class PeeksAhead(Sound):
    """Reads the mean over the whole window where there is one."""

    def score(self, context):
        mean = context.hidden.mean(-2, keepdim=True) if context.hidden.dim() > 1 else context.hidden
        return self.read(nn.functional.layer_norm(context.hidden + mean, mean.shape[-1:]))


FAULTS[PeeksAhead] = "independent"


# Sound but for what becomes of the scores: the router, its context and its scores → the faulty scores

SCORES: dict[str, tuple[str, Callable[[Any, Context, Tensor], Any]]] = {
    "WrongShape": ("shape", lambda router, context, scores: scores[..., :3]),
    "NoLeading": ("shape", lambda router, context, scores: torch.arange(scores.shape[-1]).float()),
    "NeedsWindows": ("shape", lambda router, context, scores: scores + 0 * context.executed[0, 0]),
    "EndsTheProcess": ("shape", lambda router, context, scores: sys.exit(0)),
    "WholeNumbers": ("shape", lambda router, context, scores: scores.argsort()),
    "DividesByTheBudget": ("finite", lambda router, context, scores: scores / (context.executed - 2)[..., None]),
    "DividesByThePool": ("finite", lambda router, context, scores: scores + 1 / context.pooled.norm(dim=-1)[..., None]),
    "Overflows": ("finite", lambda router, context, scores: scores + 0 * context.hidden.norm(dim=-1)[..., None].exp()),
    "Scribbles": ("repeatable", lambda router, context, scores: scores + context.hidden.mul_(0)[..., :1]),
    "Draws": ("repeatable", lambda router, context, scores: torch.rand_like(scores)),
    "Hashes": ("stable", lambda router, context, scores: torch.sin(1e9 * scores)),
    "AsksNeighbours": ("independent", lambda router, context, scores: scores - 0.5 * scores.mean(0, keepdim=True)),
    "ReadsBack": ("independent", lambda router, context, scores: scores.cummax(1)[0] if scores.dim() == 3 else scores),
    "Counts": (
        "independent",
        lambda router, context, scores: scores * scores.shape[-2] if scores.dim() > 1 else scores,
    ),
    "FirstBudget": ("independent", lambda router, context, scores: scores * context.executed.flatten()[0]),
    "Detached": ("gradients", lambda router, context, scores: scores.detach() + router.read.bias),
    "Frozen": ("gradients", lambda router, context, scores: scores.detach()),
    "TrainsOtherwise": ("plans", lambda router, context, scores: -scores if torch.is_grad_enabled() else scores),
}


def faulty(change: Callable[[Any, Context, Tensor], Any]) -> Callable[[Any, Context], Any]:
    return lambda self, context: change(self, context, Sound.score(self, context))


for name, (check, change) in SCORES.items():
    fails(check)(type(name, (Sound,), {"score": faulty(change)}))


# Sound but for one attribute: the check that fails, the sound router, the attribute → what it is instead

ATTRIBUTES: dict[tuple[str, type, str], dict[str, Any]] = {
    ("attributes", Sound, "kind"): {"OfNoKind": "dynamic"},
    ("attributes", Sound, "scope"): {"OfNoScope": "window"},
    ("attributes", Sound, "source"): {"OfNoSource": " "},
    ("attributes", Sound, "seeded"): {"PerhapsSeeded": None},
    ("calibration", Sound, "calibrate"): {
        "CannotMeasure": lambda router, probe: 1 / 0,
        "BufferMeddler": lambda router, probe: probe.model.model.rotary_emb.inv_freq.mul_(2),
        "Meddler": lambda router, probe: probe.model.model.layers[0].mlp.down_proj.weight.data.mul_(2),
        "LeavesHook": lambda router, probe: probe.model.lm_head.register_forward_hook(lambda *given: given[-1] + 1),
        "LeavesTraining": lambda router, probe: probe.model.train(),
        "ReplacesParameter": lambda router, probe: setattr(
            router.read, "weight", nn.Parameter(torch.zeros_like(router.read.weight))
        ),
    },
    ("groups", Sound, "parameter_groups"): {
        "LeavesOut": lambda router: [{"params": [router.read.weight], "scale": 1.0}],
        "OwnRate": lambda router: [{"params": [*router.parameters()], "scale": 1.0, "weight_decay": 0.5}],
        "Scaleless": lambda router: [{"params": [*router.parameters()], "lr": 1.0}],
        "ScaledWithoutEnd": lambda router: [{"params": [*router.parameters()], "scale": float("inf")}],
        "TrainsAStranger": lambda router: [
            {"params": [*router.parameters(), nn.Parameter(torch.zeros(1))], "scale": 1.0}
        ],
    },
    ("weights", SoundGates, "weigh"): {
        "Unbounded": lambda router, logits: logits,
        "WeighsTheWrongWay": lambda router, logits: (-logits).sigmoid(),
    },
    ("weights", SoundGates, "penalty"): {
        "OnePenalty": lambda router, weights, executed: weights.mean(),
        "PenaltyDivides": lambda router, weights, executed: (
            weights.mean((1, 2)) / (executed - router.geometry.always_on)
        ),
        "CountsOpenGates": lambda router, weights, executed: (weights > 0.5).float().mean((1, 2)),
        "PenaltyOfTheFirstRow": lambda router, weights, executed: (weights.sum(-1).mean(-1) - executed[0]).square(),
    },
}

for (check, base, attribute), instead in ATTRIBUTES.items():
    for name, value in instead.items():
        fails(check)(type(name, (base,), {attribute: value}))


# Other faults of routers that score


class Nameless(Sound):
    pass


FAULTS[Nameless] = "summary"


@fails("attributes")
class OtherGeometry(Sound):
    def __init__(self, geometry):
        super().__init__(geometry)
        self.geometry = Geometry(geometry.layers + 1, geometry.context_layer, geometry.hidden, geometry.features)


@fails("kind")
class NotStatic(Sound):
    kind = "static"
    seeded = True


@fails("repeatable")
class Remembers(Sound):
    total = 0.0

    def score(self, context):
        self.total = self.total + context.hidden.mean()
        return super().score(context) + self.total * self.read.bias


@fails("speed")
class Slow(Sound):
    def score(self, context):
        if context.executed.shape == (1, 1):
            time.sleep(0.11)
        return super().score(context)


@fails("independent")
class BatchNorm(Sound):
    """Mixes rows in training alone."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.norm = nn.BatchNorm1d(geometry.hidden)

    def score(self, context):
        states = context.hidden.reshape(-1, context.hidden.shape[-1])
        return self.read(self.norm(states)).reshape(*context.executed.shape, -1)


# Layer by layer


@fails("shape")
class WideGate(SoundGates):
    def gate(self, index, hidden, executed):
        return super().gate(index, hidden, executed)[..., None]


@fails("repeatable")
class GateScribbler(SoundGates):
    def gate(self, index, hidden, executed):
        return super().gate(index, hidden.add_(1), executed)


@fails("independent")
class GatePeeksAhead(SoundGates):
    def gate(self, index, hidden, executed):
        logits = super().gate(index, hidden, executed)
        return logits - logits.mean(-1, keepdim=True) if logits.dim() else logits


# Cannot be made


class KeyMissing(Sound):
    def __init__(self, geometry):
        {}["x"]


class Leaving(Sound):
    def __init__(self, geometry):
        sys.exit(0)


# One order of layers: what it keeps


class OneOrder(Router):
    """Sound, with one order of layers in a buffer."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("order", torch.zeros(geometry.routable))

    def score(self, context):
        return self.order.expand(*context.executed.shape, -1)


@fails("finite")
class ShortTable(OneOrder):
    """Has no row for full depth."""

    def score(self, context):
        return torch.diag(self.order)[context.executed - self.geometry.always_on]


@fails("seed")
class Unseeded(OneOrder):
    seeded = True

    def calibrate(self, probe: Probe):
        draw = random.SystemRandom()
        self.order.copy_(torch.tensor([draw.random() for _ in self.order]))


@fails("seed")
class SeededInSecret(OneOrder):
    def calibrate(self, probe: Probe):
        self.order.copy_(torch.rand(len(self.order), generator=torch.Generator().manual_seed(probe.seed)))


@fails("saved")
class Forgets(OneOrder):
    """Adds what it measured and keeps beside its buffers."""

    measured = 0.0

    def calibrate(self, probe: Probe):
        self.measured = probe.block_influence

    def score(self, context):
        return super().score(context) + self.measured


@fails("saved")
class ChangesItsScope(OneOrder):
    def calibrate(self, probe: Probe):
        self.scope = "prompt"


@fails("saved")
class GrowsLate(OneOrder):
    def calibrate(self, probe: Probe):
        self.register_buffer("influence", probe.block_influence)


@fails("geometry")
class OneSize(OneOrder):
    def score(self, context):
        return super().score(context) + torch.arange(6.0, device=self.order.device)


@fails("device")
class StaysAtHome(OneOrder):
    """Keeps a constant tensor that does not move."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.mix = torch.eye(geometry.hidden, geometry.routable)

    def score(self, context):
        return torch.zeros_like(context.hidden) @ self.mix


@fails("device")
class MakesAtHome(OneOrder):
    """Makes its answer on the CPU."""

    def score(self, context):
        return torch.arange(self.geometry.routable, dtype=torch.float32).expand(*context.executed.shape, -1)


@fails("bfloat16")
class TakesTheTypeOfTheModel(OneOrder):
    def calibrate(self, probe: Probe):
        self.order = probe.block_influence.to(probe.routed.backbone.dtype)
