"""Routers with one fault each, and the check that must name it."""

import random as python_random
import time

import torch
from torch import Tensor, nn

from buddy import Context, Geometry, LayerwiseRouter, Probe, Router

FAULTS: dict[type, str] = {}  # router → the only check that fails


def fails(check: str):
    def register(cls: type) -> type:
        FAULTS[cls] = check
        return cls

    return register


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


# What it says of itself


@fails("description")
class Nameless(Sound):
    pass


@fails("description")
class OfNoKind(Sound):
    """Of a kind that there is not."""

    kind = "dynamic"


@fails("description")
class OfNoScope(Sound):
    """Of a scope that there is not."""

    scope = "window"


@fails("description")
class OtherGeometry(Sound):
    """Holds another geometry than it was given."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.geometry = Geometry(geometry.layers + 1, geometry.context_layer, geometry.hidden, geometry.features)


@fails("calibration")
class CannotMeasure(Sound):
    """Fails while it calibrates."""

    def calibrate(self, probe: Probe):
        1 / 0  # noqa: B018


@fails("calibration")
class BufferMeddler(Sound):
    """Writes into what the frozen model keeps beside its weights."""

    def calibrate(self, probe: Probe):
        probe.routed.backbone.model.model.rotary_emb.inv_freq.mul_(2)


@fails("calibration")
class Meddler(Sound):
    """Writes into the frozen model."""

    def calibrate(self, probe: Probe):
        with torch.no_grad():
            probe.routed.backbone.layers[0].mlp.down_proj.weight.mul_(2)


# The form of its answer


@fails("shape")
class WrongShape(Sound):
    """Has a score for three layers, whatever the model."""

    def score(self, context):
        return super().score(context)[..., :3]


@fails("shape")
class NoLeading(Router):
    """Forgets the leading dimensions."""

    def score(self, context):
        return torch.arange(self.geometry.routable, dtype=torch.float32)


@fails("shape")
class WideGate(SoundGates):
    """Has a dimension too many."""

    def gate(self, index, hidden, executed):
        return super().gate(index, hidden, executed)[..., None]


@fails("shape")
class NeedsWindows(Sound):
    """Reads two leading dimensions."""

    def score(self, context):
        return super().score(context) + 0 * context.executed[0, 0]


@fails("shape")
class Leaves(Sound):
    """Ends the process, which would look like success."""

    def score(self, context):
        raise SystemExit(0)


@fails("dtype")
class Whole(Router):
    """Gives whole numbers."""

    def score(self, context):
        layers = torch.arange(self.geometry.routable, device=context.executed.device)
        return layers.expand(*context.executed.shape, -1)


@fails("budgets")
class ShortTable(Router):
    """Has no row for full depth."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("kept", torch.eye(geometry.routable))

    def score(self, context):
        return self.kept[context.executed - self.geometry.always_on]


@fails("mixed")
class FirstBudget(Router):
    """Serves all rows what the first one asked for."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("kept", torch.eye(geometry.routable + 1, geometry.routable))

    def score(self, context):
        first = context.executed.flatten()[0] - self.geometry.always_on
        return self.kept[first].expand(*context.executed.shape, -1)


# Its numbers


@fails("finite")
class NotANumber(Sound):
    """Divides by nought where no layer is asked for."""

    def score(self, context):
        k = context.executed - self.geometry.always_on
        return super().score(context) * (k / k)[..., None]


@fails("finite")
class Overflows(Sound):
    """Cannot stand large states."""

    def score(self, context):
        return super().score(context) + context.hidden.square().sum(-1, keepdim=True).exp().clamp(min=9) * 0


@fails("finite")
class ZeroDivision(Sound):
    """Cannot stand an empty pool."""

    def score(self, context):
        return super().score(context) + (context.pooled / context.pooled.norm(dim=-1, keepdim=True))[..., :1]


@fails("context")
class Scribbler(Sound):
    """Writes into what all share."""

    def score(self, context):
        context.hidden.mul_(0.5)
        return super().score(context)


@fails("context")
class GateScribbler(SoundGates):
    """Writes into the stream of states."""

    def gate(self, index, hidden, executed):
        return super().gate(index, hidden.add_(1), executed)


@fails("repeatable")
class Noisy(Sound):
    """Draws its scores anew each time."""

    kind = "random"

    def score(self, context):
        return torch.rand(*context.executed.shape, self.geometry.routable, device=context.executed.device)


@fails("repeatable")
class Remembers(Sound):
    """Adds up what it saw."""

    total = 0.0

    def score(self, context):
        self.total = self.total + context.hidden.mean()
        return super().score(context) + self.total * self.read.bias


@fails("stable")
class Hashes(Sound):
    """Takes the last bits of the state for a dice."""

    def score(self, context):
        return torch.sin(1e9 * super().score(context))


# What it depends on


@fails("causal")
class PeeksAhead(Sound):
    """Reads the mean over the whole window where there is one."""

    def score(self, context):
        mean = context.hidden.mean(-2, keepdim=True) if context.hidden.dim() > 1 else context.hidden
        return self.read(nn.functional.layer_norm(context.hidden + mean, mean.shape[-1:]))


@fails("causal")
class GatePeeksAhead(SoundGates):
    """Subtracts the mean over the tokens."""

    def gate(self, index, hidden, executed):
        logits = super().gate(index, hidden, executed)
        return logits - logits.mean(-1, keepdim=True) if logits.dim() else logits


@fails("causal")
class BatchNorm(Sound):
    """Normalises over the batch, which shows in training alone."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.norm = nn.BatchNorm1d(geometry.hidden)

    def score(self, context):
        states = context.hidden.reshape(-1, context.hidden.shape[-1])
        return self.read(self.norm(states)).reshape(*context.executed.shape, -1)


@fails("rows")
class AsksNeighbours(Sound):
    """Subtracts the mean over the rows."""

    def score(self, context):
        scores = super().score(context)
        return scores - 0.5 * scores.mean(0, keepdim=True) if scores.dim() == 3 else scores


@fails("alone")
class ReadsBack(Sound):
    """Takes the largest score of the tokens before, which decoding does not show."""

    def score(self, context):
        scores = super().score(context)
        return scores.cummax(1).values if scores.dim() == 3 else scores


@fails("kind")
class NotStatic(Sound):
    """Says that it has one order."""

    kind = "static"
    seeded = True


# What it keeps


@fails("seed")
class Unseeded(Router):
    """Draws from a generator that no seed reaches."""

    seeded = True

    def __init__(self, geometry):
        super().__init__(geometry)
        draw = python_random.SystemRandom()
        self.register_buffer("order", torch.tensor([draw.random() for _ in range(geometry.routable)]))

    def score(self, context):
        return self.order.expand(*context.executed.shape, -1)


@fails("seeded")
class SeededInSecret(Router):
    """Searches with random numbers and does not say so."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("order", torch.zeros(geometry.routable))

    def calibrate(self, probe: Probe):
        generator = torch.Generator().manual_seed(probe.seed)
        self.order.copy_(torch.rand(len(self.order), generator=generator))

    def score(self, context):
        return self.order.expand(*context.executed.shape, -1)


@fails("saved")
class Forgets(Router):
    """Keeps what it measured beside its buffers."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.influence = torch.zeros(geometry.routable)

    def calibrate(self, probe: Probe):
        self.influence = probe.block_influence

    def score(self, context):
        return self.influence.expand(*context.executed.shape, -1)


@fails("saved")
class GrowsLate(Router):
    """Registers a buffer once it has measured."""

    def calibrate(self, probe: Probe):
        self.register_buffer("influence", probe.block_influence)

    def score(self, context):
        if not hasattr(self, "influence"):
            return torch.zeros(*context.executed.shape, self.geometry.routable)
        return self.influence.expand(*context.executed.shape, -1)


@fails("geometry")
class OneSize(Router):
    """Was written for one model."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("order", torch.arange(6.0))

    def score(self, context):
        return (self.order + self.order.new_zeros(self.geometry.routable)).expand(*context.executed.shape, -1)


@fails("device")
class StaysAtHome(Router):
    """Keeps a constant tensor that does not move."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.mix = torch.eye(geometry.hidden, geometry.routable)
        self.kind_of = torch.zeros(geometry.routable)

    def score(self, context):
        return torch.zeros_like(context.hidden) @ self.mix


@fails("device")
class MakesAtHome(Router):
    """Makes its answer on the CPU."""

    def score(self, context):
        return torch.arange(self.geometry.routable, dtype=torch.float32).expand(*context.executed.shape, -1)


@fails("bfloat16")
class TakesTheTypeOfTheModel(Router):
    """Turns what it measured into the model's type."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("influence", torch.zeros(geometry.routable))

    def calibrate(self, probe: Probe):
        self.influence = probe.block_influence.to(probe.routed.backbone.dtype)

    def score(self, context):
        return self.influence.expand(*context.executed.shape, -1)


# Its training


@fails("groups")
class LeavesOut(Sound):
    """Does not train its bias."""

    def parameter_groups(self):
        return [{"params": [self.read.weight], "scale": 1.0}]


@fails("groups")
class Scaleless(Sound):
    """Has groups without a scale."""

    def parameter_groups(self):
        return [{"params": list(self.parameters()), "lr": 1.0}]


@fails("gradients")
class Detached(Sound):
    """Cuts the way to its weights."""

    def score(self, context):
        return super().score(context).detach() + self.read.bias


@fails("gradients")
class Frozen(Sound):
    """Scores without gradients."""

    @torch.no_grad()
    def score(self, context):
        return super().score(context)


@fails("weights")
class Unbounded(SoundGates):
    """Weighs by logits."""

    def weigh(self, logits):
        return logits


@fails("weights")
class OnePenalty(SoundGates):
    """Has one penalty for the batch."""

    def penalty(self, weights, executed):
        return weights.mean()


# At work


@fails("decoding")
class TrainsOtherwise(Sound):
    """Explores while gradients are on."""

    def score(self, context):
        scores = super().score(context)
        return scores.flip(-1) if torch.is_grad_enabled() else scores


@fails("speed")
class Slow(Sound):
    """Thinks for long while decoding."""

    def score(self, context):
        if context.executed.shape == (1, 1):
            time.sleep(0.11)
        return super().score(context)
