"""Checks of a router's attributes and outputs: their form, their numbers, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from buddy.router import AnyRouter, Router
from buddy.testing.check import Failed, check
from buddy.testing.subject import (
    LENGTH,
    ROWS,
    Inputs,
    Subject,
    close,
    decisions,
    describe,
    output_of,
    raw_outputs,
    seeded,
)

KINDS, SCOPES = ("static", "learned", "random"), ("token", "prompt")
ROUNDING = 0.05  # the share of tokens whose order of layers may change by rounding
JITTER = 1e-6  # rounding, relative
SINK_SCALE = 1e3  # how much larger the state of an attention sink is than that of other tokens (2402.17762)


@check("a summary, a kind and a source for `buddy routers`")
def description(subject: Subject) -> str:
    """The docstring's first line, `kind`, `source`, and the attributes that the engine reads."""
    cls, router = subject.cls, subject.new_router()
    summary = (cls.__dict__.get("__doc__") or "").strip().partition("\n")[0]
    if not summary:
        raise Failed("The class has no docstring; its first line is what `buddy routers` shows, so write one.")
    if cls.kind not in KINDS:
        raise Failed(f"kind is {cls.kind!r}; set it to one of {', '.join(map(repr, KINDS))}.")
    if not isinstance(cls.source, str) or not cls.source.strip():
        raise Failed(f"source is {cls.source!r}; name where the method was published, or leave it out.")
    if router.scope not in SCOPES:
        raise Failed(f"scope is {router.scope!r}; set it to one of {', '.join(map(repr, SCOPES))}.")
    for flag in ("full_depth", "seeded"):
        if not isinstance(getattr(cls, flag), bool):
            raise Failed(f"{flag} is {getattr(cls, flag)!r}; set it to True or False.")
    if getattr(router, "geometry", None) != subject.geometry:
        raise Failed("geometry is not what the router was made with; call super().__init__(geometry) and keep it.")
    return summary


@check("calibrate works, and leaves the model as it was", description)
def calibration(subject: Subject) -> str:
    """The first step of `buddy fit`. All routers share the frozen model."""
    model = subject.backbone.model
    before = _sums(model)
    try:
        subject.calibrated_router()
    except Exception as error:
        raise Failed(f"{describe(error, subject.cls)} in calibrate; fix it.") from error
    after = _sums(model)
    if changed := [name for name in before if after.get(name) != before[name]]:
        raise Failed(f"calibrate changes the model ({changed[0]}); work on copies of its weights and buffers.")
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise Failed("calibrate leaves model parameters that require gradients; freeze them again.")
    return "the model is unchanged"


@torch.no_grad()
def _sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Two sums of each parameter and buffer, since a copy of a large model would double its memory."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    return {name: (float(tensor.sum()), float(tensor.float().norm())) for name, tensor in tensors}


@check("a number for each routable layer, whatever the leading dimensions", calibration)
def shape(subject: Subject) -> str:
    """Contexts of (), (T,), (B, T) and of one decode step, (B, 1)."""
    router, routable, inputs = subject.router(), subject.geometry.routable, subject.inputs
    scored = isinstance(router, Router)
    advice = "return one logit for each token, without the last dimension of hidden"
    if scored:
        advice = (
            "return geometry.routable numbers in the last dimension and keep the others, as "
            "scores.expand(*context.executed.shape, -1) does"
        )
    for part in (inputs[0, 0], inputs[0], inputs, inputs[:, :1]):
        expected = (*part.leading, routable) if scored else part.leading
        try:
            outputs = _outputs(router, part)
        except Exception as error:
            raise Failed(
                f"{describe(error, subject.cls)} for leading dimensions {part.leading}; {subject.method} takes any, "
                "from () to (B, T): count dimensions from the last, and combine nothing along the others."
            ) from error
        for output in outputs:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            if found != expected:
                raise Failed(
                    f"{subject.method} gives {found} for leading dimensions {part.leading}, not {expected}; {advice}."
                )
    return f"{routable} numbers for (), (T,), (B, T) and (B, 1)"


@check("float32", shape)
def dtype(subject: Subject) -> str:
    """One type for all devices and backbones."""
    for output in _outputs(subject.router(), subject.inputs):
        if output.dtype != torch.float32:
            raise Failed(f"{subject.method} gives {output.dtype}; end it with .float().")
    return "float32"


@check("an answer for each K, from the least to full depth", dtype)
def budgets(subject: Subject) -> str:
    """Each K that a row of a batch may ask for."""
    router, inputs, least, most = subject.router(), subject.inputs, subject.depths[0], subject.depths[-1]
    for depth in subject.depths:
        try:
            output_of(router, inputs.at(depth))
        except Exception as error:
            raise Failed(
                f"{describe(error, subject.cls)} when {depth} layers are requested; support each K from {least} "
                f"to {most}, where a table by K − always_on needs routable + 1 rows."
            ) from error
    return f"K from {least} to {most}"


@check("finite numbers for each K, for sinks and for padding", budgets)
def finite(subject: Subject) -> str:
    """For each K, for the large states of attention sinks, and where nothing was pooled yet, as in padding."""
    router, inputs, padding = subject.router(), subject.inputs, subject.inputs.copy()
    padding.context.pooled[:, 0] = 0.0
    cases = {f"K = {depth}": inputs.at(depth) for depth in subject.depths}
    cases["the large states of an attention sink"] = inputs.map(lambda x: SINK_SCALE * x)
    cases["a pooled state of zeros, as padding has"] = padding
    for case, part in cases.items():
        wrong = ~output_of(router, part).isfinite()
        if wrong.any():
            raise Failed(
                f"{int(wrong.sum())} of {wrong.numel()} numbers are not finite for {case}; guard divisions, logarithms "
                "and roots, and normalise what is read."
            )
    return f"{len(cases)} cases"


@check("the context stays as it was", finite)
def context(subject: Subject) -> str:
    """All routers and tokens share it."""
    router, inputs = subject.router(), subject.inputs.copy()
    with torch.no_grad():
        raw_outputs(router, inputs)
    for name in ("pooled", "newest", "hidden", "executed"):
        if not torch.equal(getattr(inputs.context, name), getattr(subject.inputs.context, name)):
            raise Failed(f"{subject.method} changes context.{name} in place; work on a new tensor, as x = x + 1 does.")
    if not torch.equal(inputs.arriving, subject.inputs.arriving):
        raise Failed("gate changes the hidden state in place; work on a new tensor, as x = x + 1 does.")
    return "unchanged"


@check("the same answer to the same context", context)
def repeatable(subject: Subject) -> str:
    """After other contexts, and with another state of the random generators."""
    router, inputs = subject.router(), subject.inputs
    with seeded(0):
        first = output_of(router, inputs)
    output_of(router, inputs.map(lambda x: x.flip(-1)))
    with seeded(1):
        again = output_of(router, inputs)
    if not torch.equal(first, again):
        raise Failed(
            f"{subject.method} gives another answer to the same context the second time; draw random numbers "
            "in __init__ or calibrate only, and remember nothing between calls."
        )
    return "to the bit"


@check("each row is answered for its own K", repeatable)
def mixed(subject: Subject) -> str:
    """Rows of a batch may ask for different ones."""
    router, inputs, depths = subject.router(), subject.inputs, subject.depths
    batches = torch.arange(ROWS * len(depths)).reshape(-1, ROWS) % len(depths)
    for executed in torch.tensor(depths)[batches].to(inputs.arriving.device):
        together = output_of(router, inputs.at(executed[:, None]))
        for row, depth in enumerate(executed.tolist()):
            same = close(together[row], output_of(router, inputs.at(depth))[row])
            if same.float().mean() < 1 - ROUNDING:
                raise Failed(
                    "The answer for a row changes with what other rows ask for; use context.executed of each token, "
                    "not that of the first or the largest."
                )
    return f"{len(batches)} batches"


@check("rounding does not change the order of layers", mixed)
def stable(subject: Subject) -> str:
    """A change of a millionth; otherwise decoding would not follow the plans of training."""
    router, inputs, generator = subject.router(), subject.inputs, torch.Generator().manual_seed(0)
    jittered = inputs.map(lambda x: x * (1 + JITTER * torch.randn(x.shape, generator=generator).to(x)))
    one, two = (decisions(router, output_of(router, each)) for each in (inputs, jittered))
    changed = (one != two).any(-1).float().mean().item()
    if changed > ROUNDING:
        raise Failed(
            f"A change of {JITTER:g} in the context, as rounding makes it, changes the plan of {changed:.0%} of "
            "the tokens; let the answer depend smoothly on the context, with no hashing and no differences of "
            "large numbers."
        )
    return f"{1 - changed:.0%} of tokens"


@check("nothing from later tokens", stable)
def causal(subject: Subject) -> str:
    """Other tokens from some position on change no output before it."""
    position = torch.arange(LENGTH, device=subject.windows.device)
    for outputs in _modes(subject.router()):
        before = outputs(subject.inputs)
        for cut in range(1, LENGTH):
            after = outputs(subject.inputs.blend(subject.other_inputs, (position >= cut).expand(ROWS, -1)))
            if not close(before[:, :cut], after[:, :cut]).all():
                raise Failed(
                    f"The answer for a token changes with the tokens after it; {subject.method} may combine nothing "
                    "along the dimension of tokens (no mean, softmax or norm over it): pooled holds the prefix."
                )
    return "unchanged before each cut"


@check("nothing from other rows of a batch", causal)
def rows(subject: Subject) -> str:
    """Other tokens in one row change no output of the others."""
    row = torch.arange(ROWS, device=subject.windows.device)
    for outputs in _modes(subject.router()):
        before = outputs(subject.inputs)
        for changed in range(ROWS):
            replaced = (row == changed)[:, None].expand(-1, LENGTH)
            after = outputs(subject.inputs.blend(subject.other_inputs, replaced))
            if not close(before, after)[~replaced].all():
                raise Failed(
                    f"The answer for a row changes with other rows of the batch; {subject.method} may combine nothing "
                    "along the dimension of rows (no mean, batch norm or softmax over it)."
                )
    return "unchanged"


@check("a token alone is answered as among others", rows)
def alone(subject: Subject) -> str:
    """As in decoding: one token, without those before it."""
    router, inputs = subject.router(), subject.inputs
    whole, same = output_of(router, inputs), []
    for token in range(LENGTH):
        row = token % ROWS
        for part in (inputs[row, token], inputs[row : row + 1, token : token + 1]):
            same.append(bool(close(output_of(router, part).reshape(-1), whole[row, token])))
    if same.count(False) > ROUNDING * len(same):
        raise Failed(
            f"A token shown alone, as in decoding, gets another answer than among others; {subject.method} may "
            "use nothing but the token's own entries of the context, not those of earlier tokens or their number."
        )
    return f"{len(same)} tokens"


@check("the kind that it says it is", alone)
def kind(subject: Subject) -> str:
    """A static router has one order for all tokens."""
    outputs = output_of(subject.router(), subject.inputs)
    if subject.cls.kind == "static" and not close(outputs, outputs[:1, :1]).all():
        raise Failed('kind is \'static\', but the answer depends on the token; set kind = "learned", or "random".')
    return subject.cls.kind


@torch.no_grad()
def _outputs(router: AnyRouter, inputs: Inputs) -> list[Any]:
    return raw_outputs(router, inputs.copy())


def _modes(router: AnyRouter) -> Iterator[Callable[[Inputs], Tensor]]:
    """Its output in serving and, where it is trained, in training: batch norm mixes tokens only there."""
    yield lambda inputs: output_of(router, inputs)
    if router.trainable:
        router.train()

        def in_training(inputs: Inputs) -> Tensor:
            with seeded(0):  # so that dropout drops the same
                return output_of(router, inputs)

        yield in_training
