"""Routers with one fault each, and the check that must name it."""

import random as python_random
import time

import torch
from torch import Tensor, nn

from buddy import Context, Geometry, LayerwiseRouter, Probe, Router

FAULTS: dict[type, tuple[str, str]] = {}  # router → the check that fails, and words of its sentence


def fails(check: str, words: str):
    def note(cls: type) -> type:
        FAULTS[cls] = check, words
        return cls

    return note


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


def read(router: Router, context: Context) -> Tensor:
    return Sound.score(router, context)


class _Linear(Router):
    """What the faulty ones below share."""

    kind = "learned"

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.read = nn.Linear(geometry.hidden, geometry.routable)


# What it says of itself


@fails("description", "The class has no docstring")
class Nameless(_Linear):
    def score(self, context):
        return read(self, context)


@fails("description", "kind is 'dynamic'; set it to one of 'static', 'learned', 'random'")
class OfNoKind(_Linear):
    """Of a kind that there is not."""

    kind = "dynamic"

    def score(self, context):
        return read(self, context)


@fails("description", "scope is 'window'; set it to one of 'token', 'prompt'")
class OfNoScope(_Linear):
    """Of a scope that there is not."""

    scope = "window"

    def score(self, context):
        return read(self, context)


@fails("description", "call super().__init__(geometry)")
class OtherGeometry(_Linear):
    """Holds another geometry than it was given."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.geometry = Geometry(geometry.layers + 1, geometry.context_layer, geometry.hidden, geometry.features)

    def score(self, context):
        return read(self, context)


@fails("calibration", "ZeroDivisionError: division by zero (line ")
class CannotMeasure(_Linear):
    """Fails while it calibrates."""

    def calibrate(self, probe: Probe):
        1 / 0  # noqa: B018

    def score(self, context):
        return read(self, context)


@fails("calibration", "calibrate changes the model (model.rotary_emb.inv_freq)")
class BufferMeddler(_Linear):
    """Writes into what the frozen model keeps beside its weights."""

    def calibrate(self, probe: Probe):
        probe.routed.backbone.model.model.rotary_emb.inv_freq.mul_(2)

    def score(self, context):
        return read(self, context)


@fails("calibration", "calibrate changes the model (model.layers.0.")
class Meddler(_Linear):
    """Writes into the frozen model."""

    def calibrate(self, probe: Probe):
        with torch.no_grad():
            probe.routed.backbone.layers[0].mlp.down_proj.weight.mul_(2)

    def score(self, context):
        return read(self, context)


# The form of its answer


@fails("shape", "score gives (3,) for leading dimensions (), not (6,); return geometry.routable numbers")
class WrongShape(_Linear):
    """Has a score for three layers, whatever the model."""

    def score(self, context):
        return read(self, context)[..., :3]


@fails("shape", "score gives (6,) for leading dimensions (12,), not (12, 6)")
class NoLeading(Router):
    """Forgets the leading dimensions."""

    def score(self, context):
        return torch.arange(self.geometry.routable, dtype=torch.float32)


@fails("shape", "gate gives (1,) for leading dimensions (), not ()")
class WideGate(SoundGates):
    """Has a dimension too many."""

    def gate(self, index, hidden, executed):
        return super().gate(index, hidden, executed)[..., None]


@fails("shape", "for leading dimensions (); score takes any, from () to (B, T)")
class NeedsWindows(_Linear):
    """Reads two leading dimensions."""

    def score(self, context):
        return read(self, context) + 0 * context.executed[0, 0]


@fails("shape", "Leaves raises SystemExit: 0 (line ")
class Leaves(_Linear):
    """Ends the process, which would look like success."""

    def score(self, context):
        raise SystemExit(0)


@fails("dtype", "score gives torch.int64; end it with .float()")
class Whole(Router):
    """Gives whole numbers."""

    def score(self, context):
        layers = torch.arange(self.geometry.routable, device=context.executed.device)
        return layers.expand(*context.executed.shape, -1)


@fails("budgets", "IndexError: index 6 is out of bounds for dimension 0 with size 6")
class ShortTable(Router):
    """Has no row for full depth."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("kept", torch.eye(geometry.routable))

    def score(self, context):
        return self.kept[context.executed - self.geometry.always_on]


@fails("mixed", "changes with what other rows ask for; use context.executed of each token")
class FirstBudget(Router):
    """Serves all rows what the first one asked for."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("kept", torch.eye(geometry.routable + 1, geometry.routable))

    def score(self, context):
        first = context.executed.flatten()[0] - self.geometry.always_on
        return self.kept[first].expand(*context.executed.shape, -1)


# Its numbers


@fails("finite", "numbers are not finite for K = 2; guard divisions")
class NotANumber(_Linear):
    """Divides by nought where no layer is asked for."""

    def score(self, context):
        k = context.executed - self.geometry.always_on
        return read(self, context) * (k / k)[..., None]


@fails("finite", "not finite for the large states of an attention sink")
class Overflows(_Linear):
    """Cannot stand large states."""

    def score(self, context):
        return read(self, context) + context.hidden.square().sum(-1, keepdim=True).exp().clamp(min=9) * 0


@fails("finite", "not finite for a pooled state of zeros, as padding has")
class ZeroDivision(_Linear):
    """Cannot stand an empty pool."""

    def score(self, context):
        return read(self, context) + (context.pooled / context.pooled.norm(dim=-1, keepdim=True))[..., :1]


@fails("context", "score changes context.hidden in place")
class Scribbler(_Linear):
    """Writes into what all share."""

    def score(self, context):
        context.hidden.mul_(0.5)
        return read(self, context)


@fails("context", "gate changes the hidden state in place")
class GateScribbler(SoundGates):
    """Writes into the stream of states."""

    def gate(self, index, hidden, executed):
        return super().gate(index, hidden.add_(1), executed)


@fails("repeatable", "draw random numbers in __init__ or calibrate only")
class Noisy(_Linear):
    """Draws its scores anew each time."""

    kind = "random"

    def score(self, context):
        return torch.rand(*context.executed.shape, self.geometry.routable, device=context.executed.device)


@fails("repeatable", "remember nothing between calls")
class Remembers(_Linear):
    """Adds up what it saw."""

    total = 0.0

    def score(self, context):
        self.total = self.total + context.hidden.mean()
        return read(self, context) + self.total * self.read.bias


@fails("stable", "changes the plan of 100% of the tokens; let the answer hang smoothly on the context")
class Hashes(_Linear):
    """Takes the last bits of the state for a dice."""

    def score(self, context):
        return torch.sin(1e9 * read(self, context))


# What it depends on


@fails("causal", "combine nothing along the dimension of tokens")
class PeeksAhead(_Linear):
    """Reads the mean over the whole window where there is one."""

    def score(self, context):
        mean = context.hidden.mean(-2, keepdim=True) if context.hidden.dim() > 1 else context.hidden
        return self.read(nn.functional.layer_norm(context.hidden + mean, mean.shape[-1:]))


@fails("causal", "gate may combine nothing along the dimension of tokens")
class GatePeeksAhead(SoundGates):
    """Subtracts the mean over the tokens."""

    def gate(self, index, hidden, executed):
        logits = super().gate(index, hidden, executed)
        return logits - logits.mean(-1, keepdim=True) if logits.dim() else logits


@fails("causal", "no mean, softmax or norm over it")
class BatchNorm(_Linear):
    """Normalises over the batch, which shows in training alone."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.norm = nn.BatchNorm1d(geometry.hidden)

    def score(self, context):
        states = context.hidden.reshape(-1, context.hidden.shape[-1])
        return self.read(self.norm(states)).reshape(*context.executed.shape, -1)


@fails("rows", "combine nothing along the dimension of rows")
class AsksNeighbours(_Linear):
    """Subtracts the mean over the rows."""

    def score(self, context):
        scores = read(self, context)
        return scores - 0.5 * scores.mean(0, keepdim=True) if scores.dim() == 3 else scores


@fails("alone", "A token shown alone, as in decoding, gets another answer")
class ReadsBack(_Linear):
    """Takes the largest score of the tokens before, which decoding does not show."""

    def score(self, context):
        scores = read(self, context)
        return scores.cummax(1).values if scores.dim() == 3 else scores


@fails("kind", "kind is 'static', but the answer hangs on the token; set kind = \"learned\"")
class NotStatic(_Linear):
    """Says that it has one order."""

    kind = "static"
    seeded = True

    def score(self, context):
        return read(self, context)


# What it keeps


@fails("seed", "Two routers made and calibrated with one seed differ")
class Unseeded(Router):
    """Draws from a generator that no seed reaches."""

    seeded = True

    def __init__(self, geometry):
        super().__init__(geometry)
        draw = python_random.SystemRandom()
        self.register_buffer("order", torch.tensor([draw.random() for _ in range(geometry.routable)]))

    def score(self, context):
        return self.order.expand(*context.executed.shape, -1)


@fails("seeded", "seeded is False; set seeded = True")
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


@fails("saved", "keep all that was measured or drawn in parameters or buffers")
class Forgets(Router):
    """Keeps what it measured beside its buffers."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.influence = torch.zeros(geometry.routable)

    def calibrate(self, probe: Probe):
        self.influence = probe.block_influence

    def score(self, context):
        return self.influence.expand(*context.executed.shape, -1)


@fails("saved", "register every parameter and buffer in __init__, in its final shape")
class GrowsLate(Router):
    """Registers a buffer once it has measured."""

    def calibrate(self, probe: Probe):
        self.register_buffer("influence", probe.block_influence)

    def score(self, context):
        if not hasattr(self, "influence"):
            return torch.zeros(*context.executed.shape, self.geometry.routable)
        return self.influence.expand(*context.executed.shape, -1)


@fails("geometry", "on a backbone of 5 layers, context_layer 2 and pool 'value'; take all sizes from geometry")
class OneSize(Router):
    """Was written for one model."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.register_buffer("order", torch.arange(6.0))

    def score(self, context):
        return (self.order + self.order.new_zeros(self.geometry.routable)).expand(*context.executed.shape, -1)


@fails("device", "keep tensors in parameters or buffers (register_buffer), which move with the router")
class StaysAtHome(Router):
    """Keeps a constant tensor that does not move."""

    def __init__(self, geometry):
        super().__init__(geometry)
        self.mix = torch.eye(geometry.hidden, geometry.routable)
        self.kind_of = torch.zeros(geometry.routable)

    def score(self, context):
        return torch.zeros_like(context.hidden) @ self.mix


@fails("device", "The answer lies on cpu where the context is on another device")
class MakesAtHome(Router):
    """Makes its answer on the CPU."""

    def score(self, context):
        return torch.arange(self.geometry.routable, dtype=torch.float32).expand(*context.executed.shape, -1)


@fails("bfloat16", "On a backbone in bfloat16 score gives torch.bfloat16; keep what it knows in float32")
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


@fails("groups", "parameter_groups names read.bias 0 times")
class LeavesOut(_Linear):
    """Does not train its bias."""

    def parameter_groups(self):
        return [{"params": [self.read.weight], "scale": 1.0}]

    def score(self, context):
        return read(self, context)


@fails("groups", 'with no "scale" above 0')
class Scaleless(_Linear):
    """Has groups without a scale."""

    def parameter_groups(self):
        return [{"params": list(self.parameters()), "lr": 1.0}]

    def score(self, context):
        return read(self, context)


@fails("gradients", "No gradient reaches read.weight; use no detach")
class Detached(_Linear):
    """Cuts the way to its weights."""

    def score(self, context):
        return read(self, context).detach() + self.read.bias


@fails("gradients", "The answer hangs on no parameter")
class Frozen(_Linear):
    """Scores without gradients."""

    @torch.no_grad()
    def score(self, context):
        return read(self, context)


@fails("weights", "weigh leaves [0, 1] or the shape of its logits")
class Unbounded(SoundGates):
    """Weighs by logits."""

    def weigh(self, logits):
        return logits


@fails("weights", "penalty gives () for 3 rows")
class OnePenalty(SoundGates):
    """Has one penalty for the batch."""

    def penalty(self, weights, executed):
        return weights.mean()


# At work


@fails("decoding", "of the plans are others than for the window at once; score may depend on nothing but")
class TrainsOtherwise(_Linear):
    """Explores while gradients are on."""

    def score(self, context):
        scores = read(self, context)
        return scores.flip(-1) if torch.is_grad_enabled() else scores


@fails("speed", "One answer for one token takes")
class Slow(_Linear):
    """Thinks for long while decoding."""

    def score(self, context):
        if context.executed.shape == (1, 1):
            time.sleep(0.11)
        return read(self, context)
