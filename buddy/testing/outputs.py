"""Checks of a router's attributes and outputs: their form, their numbers, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import chain

import torch
from torch import Tensor, nn

from buddy.router import AnyRouter, Context, Router
from buddy.testing.check import Failed, check, explained
from buddy.testing.subject import LENGTH, ROWS, Inputs, Subject, output_of, raw_outputs, seeded

VALUES = {  # of the attributes that the engine and `buddy routers` read
    "kind": ("static", "learned", "random"),
    "scope": ("token", "prompt"),
    "full_depth": (False, True),
    "seeded": (False, True),
}
ROUNDING = 0.05  # the share of tokens whose order of layers may change by rounding
JITTER = 1e-6  # rounding, relative
SINK_SCALE = 1e3  # how much larger the state of an attention sink is than that of other tokens (2402.17762)


@check("a summary for `buddy routers`")
def summary(subject: Subject) -> str:
    summary = (subject.cls.__dict__.get("__doc__") or "").strip().partition("\n")[0]
    if not summary:
        raise Failed("The class has no docstring; its first line is what `buddy routers` shows, so write one.")
    return summary


@check("attributes with values that the engine and `buddy routers` know")
def attributes(subject: Subject) -> str:
    cls, router = subject.cls, subject.new_router()
    for name, allowed in VALUES.items():
        value = getattr(router, name)
        if value not in allowed:
            raise Failed(f"{name} is {value!r}; set it to one of {', '.join(map(repr, allowed))}.")
    if not isinstance(cls.source, str) or not cls.source.strip():
        raise Failed(f"source is {cls.source!r}; name where the method was published, or leave it out.")
    if getattr(router, "geometry", None) != subject.geometry:
        raise Failed("geometry is not what the router was made with; call super().__init__(geometry) and keep it.")
    return f"{router.kind}, a plan for each {router.scope}"


@check("calibrate works, and leaves the model as it was", attributes)
@torch.no_grad()
def calibration(subject: Subject) -> str:
    model = subject.backbone.model
    before, logits, router = _sums(model), model(subject.windows).logits, subject.new_router()
    parameters = dict(router.named_parameters())
    subject.calibrate(router)
    after = _sums(model)
    if changed := [name for name in before if after.get(name) != before[name]]:
        raise Failed(f"calibrate changes the model ({changed[0]}); work on copies of its weights and buffers.")
    if replaced := [name for name, each in router.named_parameters() if each is not parameters.get(name)]:
        raise Failed(f"calibrate replaces {replaced[0]}, which the optimizer holds already; write into it by copy_.")
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise Failed("calibrate leaves model parameters that require gradients; freeze them again.")
    if any(module.training for module in model.modules()) or not torch.equal(model(subject.windows).logits, logits):
        raise Failed("calibrate leaves a model that answers differently; remove its hooks, and call model.eval().")
    return "the model is unchanged"


def _sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Two sums of each parameter and buffer, since a copy of a large model would double its memory."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {name: (float(tensor.sum()), float(tensor.float().norm())) for name, tensor in tensors}


@check("a float32 number for each routable layer, whatever the leading dimensions", calibration)
@torch.no_grad()
def shape(subject: Subject) -> str:
    router, routable, inputs = subject.router(), subject.geometry.routable, subject.inputs
    if isinstance(router, Router):
        last: tuple[int, ...] = (routable,)
        form = (
            "return geometry.routable numbers in the last dimension, as scores.expand(*context.executed.shape, -1) does"
        )
    else:
        last, form = (), "return one logit for each token, without the last dimension of hidden"
    for part in (inputs[0, 0], inputs[0, :], inputs, inputs[:, :1]):
        leading = tuple(part.context.executed.shape)
        advice = "takes any, from () to (B, T): count dimensions from the last, and combine nothing along the others."
        with explained(subject, f"for leading dimensions {leading}; {subject.method} {advice}"):
            outputs = raw_outputs(router, part.copy())
        for output in outputs:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            if found != leading + last:
                raise Failed(
                    f"{subject.method} gives {found} for leading dimensions {leading}, not {leading + last}; {form}."
                )
            if output.dtype != torch.float32:
                raise Failed(f"{subject.method} gives {output.dtype}; end it with .float().")
    return f"{routable} numbers for (), (T,), (B, T) and (B, 1)"


@check("finite numbers for each K, from the least to full depth, for sinks and for padding", shape)
def finite(subject: Subject) -> str:
    router, inputs, depths, padding = subject.router(), subject.inputs, subject.depths, subject.inputs.copy()
    padding.context.pooled[:, 0] = 0.0
    cases = {f"K = {depth}": inputs.at(depth) for depth in depths}
    cases["the large states of an attention sink"] = inputs.vary(lambda x: SINK_SCALE * x)
    cases["a pooled state of zeros, as padding has"] = padding
    for case, part in cases.items():
        with explained(
            subject, f"for {case}; support each K to full depth: a table by K − always_on needs routable + 1 rows."
        ):
            wrong = ~output_of(router, part).isfinite()
        if wrong.any():
            raise Failed(
                f"{int(wrong.sum())} of {wrong.numel()} numbers are not finite for {case}; guard divisions, logarithms "
                "and roots, and normalise what is read."
            )
    return f"K from {depths[0]} to {depths[-1]}"


@check("the same answer to the same context, which stays as it was", finite)
def repeatable(subject: Subject) -> str:
    """After other contexts, and with another state of the random generators."""
    router, inputs, given = subject.router(), subject.inputs, subject.inputs.copy()
    with torch.no_grad():
        raw_outputs(router, given)
    for field in fields(Context):
        if not torch.equal(getattr(given.context, field.name), getattr(inputs.context, field.name)):
            raise Failed(f"score changes context.{field.name} in place; work on a new tensor, as x = x + 1 does.")
    if not torch.equal(given.arriving, inputs.arriving):
        raise Failed("gate changes the hidden state in place; work on a new tensor, as x = x + 1 does.")
    with seeded(0):
        first = output_of(router, inputs)
    output_of(router, inputs.vary(lambda x: x.flip(-1)))
    with seeded(1):
        again = output_of(router, inputs)
    if not torch.equal(first, again):
        raise Failed(
            f"{subject.method} gives another answer to the same context the second time; draw random numbers "
            "in __init__ or calibrate only, and remember nothing between calls."
        )
    return "to the bit"


@check("rounding does not change the order of layers", repeatable)
def stable(subject: Subject) -> str:
    """Otherwise decoding would not follow the plans of training."""
    router, inputs, generator = subject.router(), subject.inputs, torch.Generator().manual_seed(0)
    jittered = inputs.vary(lambda x: x * (1 + JITTER * torch.randn(x.shape, generator=generator).to(x)))
    one, two = output_of(router, inputs), output_of(router, jittered)
    if isinstance(router, Router):
        same = (one.argsort(stable=True, descending=True) == two.argsort(stable=True, descending=True)).all(-1)
    else:
        same = ((one > 0) == (two > 0)).all(-1)
    share = same.float().mean().item()
    if share < 1 - ROUNDING:
        raise Failed(
            f"A change of {JITTER:g} in the context, as rounding makes it, changes the plan of {1 - share:.0%} of "
            "the tokens; let the answer depend smoothly on the context, with no hashing and no differences of "
            "large numbers."
        )
    return f"{share:.0%} of tokens"


@check("the answer for a token depends on its own entries of the context alone", stable)
def independent(subject: Subject) -> str:
    """Other tokens are replaced, or left out as in decoding; their K is another one too."""
    router, inputs = subject.router(), subject.inputs
    whole, same = output_of(router, inputs), []
    for output in _modes(subject.router()):
        before = output(inputs)
        for leak, replaced in _other_tokens(subject.windows.device):
            if not _close(before, output(inputs.blend(subject.other_inputs, replaced)))[~replaced].all():
                raise Failed(_leak(subject, f"changes with {leak}"))
    for token in range(LENGTH):
        row = token % ROWS
        for part in (inputs[row, token], inputs[row : row + 1, token : token + 1]):
            same.append(bool(_close(output_of(router, part).reshape(-1), whole[row, token])))
    if same.count(False) > ROUNDING * len(same):
        raise Failed(_leak(subject, "is another one when the token is shown alone, as in decoding"))
    return "nothing from other rows, later or earlier tokens"


def _leak(subject: Subject, what: str) -> str:
    return (
        f"The answer for a token {what}; {subject.method} may combine nothing along the dimensions of rows and tokens "
        "(no mean, softmax or norm over them, no other token's executed): pooled holds the prefix."
    )


def _other_tokens(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Sets of tokens: what they are to those outside the set, and a mask (ROWS, LENGTH)."""
    row = torch.arange(ROWS, device=device)[:, None].expand(-1, LENGTH)
    position = torch.arange(LENGTH, device=device).expand(ROWS, -1)
    yield from (("other rows of the batch", row == each) for each in range(ROWS))
    yield from (("later tokens", position >= cut) for cut in range(1, LENGTH))
    yield from (("earlier tokens", position < cut) for cut in range(1, LENGTH))


def _modes(router: AnyRouter) -> Iterator[Callable[[Inputs], Tensor]]:
    """Its output in serving and, where it is trained, in training: batch norm mixes tokens only there."""
    yield lambda inputs: output_of(router, inputs)
    if router.trainable:
        router.train()

        def in_training(inputs: Inputs) -> Tensor:
            with seeded(0):  # so that dropout drops the same
                return output_of(router, inputs)

        yield in_training


def _close(one: Tensor, two: Tensor) -> Tensor:
    """(...) bool: tokens whose outputs (..., R) differ by no more than rounding.

    The tolerance follows the spread over layers, so that a large number common to all layers hides nothing.
    """
    spread = (one - one.mean(-1, keepdim=True)).abs().amax()
    return ((one - two).abs() <= 1e-4 * spread + 1e-5 * one.abs().amax()).all(-1)


@check("the kind that it says it is", independent)
def kind(subject: Subject) -> str:
    """A static router has one order for all tokens."""
    outputs = output_of(subject.router(), subject.inputs)
    if subject.cls.kind == "static" and not _close(outputs, outputs[:1, :1]).all():
        raise Failed('kind is \'static\', but the answer depends on the token; set kind = "learned", or "random".')
    return subject.cls.kind
