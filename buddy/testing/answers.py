"""Checks of what a router says of itself and of its answers: form, numbers, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from buddy.router import AnyRouter, Router
from buddy.testing.check import Failed, check
from buddy.testing.subject import LENGTH, PARTS, ROWS, Sight, Subject, alike, answer, decisions, outputs, raised, seeded

KINDS, SCOPES = ("static", "learned", "random"), ("token", "prompt")


@check("a summary, a kind and a source for `buddy routers`")
def description(subject: Subject) -> str:
    """A docstring's first line, `kind`, `source`, and what the engine goes by."""
    cls, router = subject.cls, subject.made()
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
    """What `buddy fit` does first. The frozen model is everybody's."""
    model = subject.backbone.model
    before = _sums(model)
    try:
        subject.calibrated()
    except Exception as error:
        raise Failed(f"{raised(error, subject.cls)} in calibrate; mend it there.") from error
    after = _sums(model)
    if changed := [name for name in before if after.get(name) != before[name]]:
        raise Failed(f"calibrate changes the model ({changed[0]}); work on copies of its weights and buffers.")
    if any(parameter.requires_grad for parameter in model.parameters()):
        raise Failed("calibrate leaves model parameters that ask for gradients; freeze them again.")
    return "the model is unchanged"


@torch.no_grad()
def _sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Two sums of each parameter and buffer: a copy of a large model would take its memory again."""
    held = chain(model.named_parameters(), model.named_buffers())
    return {name: (float(tensor.sum()), float(tensor.float().norm())) for name, tensor in held}


RARE = 0.05  # the share of tokens whose layers may change places by rounding
JITTER = 1e-6  # rounding, relative
HARD = 1e3  # how much larger the state of an attention sink is than that of other tokens (2402.17762)


@check("a number for each routable layer, whatever the leading dimensions", calibration)
def shape(subject: Subject) -> str:
    """Contexts of (), (T,), (B, T) and of one decode step, (B, 1)."""
    router, routable = subject.router(), subject.geometry.routable
    for sight in (subject.seen[0, 0], subject.seen[0], subject.seen, subject.seen[:, :1]):
        expected = (*sight.leading, routable) if isinstance(router, Router) else sight.leading
        for given in _any_leading(subject, router, sight):
            if not isinstance(given, Tensor) or tuple(given.shape) != expected:
                got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise Failed(
                    f"{subject.asked} gives {got} for leading dimensions {sight.leading}, not {expected}; "
                    f"{_form(router)}."
                )
    return f"{routable} numbers for (), (T,), (B, T) and (B, 1)"


@check("float32", shape)
def dtype(subject: Subject) -> str:
    """One type for all devices and backbones."""
    for given in _asked(subject.router(), subject.seen):
        if given.dtype != torch.float32:
            raise Failed(f"{subject.asked} gives {given.dtype}; end it with .float().")
    return "float32"


@check("an answer for each K, from the least to full depth", dtype)
def budgets(subject: Subject) -> str:
    """From the least to full depth, which some rows of a batch may ask for."""
    router, seen, depths = subject.router(), subject.seen, subject.depths
    for depth in depths:
        try:
            answer(router, seen.at(depth))
        except Exception as error:
            least, most = depths[0], depths[-1]
            raise Failed(
                f"{raised(error, subject.cls)} when {depth} layers are asked for; answer each K from {least} "
                f"to {most}, where a table by K − always_on needs routable + 1 rows."
            ) from error
    return f"K from {depths[0]} to {depths[-1]}"


@check("finite numbers for each K, for sinks and for padding", budgets)
def finite(subject: Subject) -> str:
    """For each K, for the huge states of attention sinks, and where nothing was pooled yet, as in padding."""
    router, seen = subject.router(), subject.seen
    shown = {f"K = {depth}": seen.at(depth) for depth in subject.depths}
    shown["the large states of an attention sink"] = seen.map(lambda x: HARD * x)
    shown["a pooled state of zeros, as padding has"] = _padding(seen)
    for case, sight in shown.items():
        given = answer(router, sight)
        if not given.isfinite().all():
            count = int((~given.isfinite()).sum())
            raise Failed(
                f"{count} of {given.numel()} numbers are not finite for {case}; guard divisions, logarithms "
                "and roots, and normalise what is read."
            )
    return f"{len(shown)} cases"


@check("the context stays as it was", finite)
def context(subject: Subject) -> str:
    """All routers and tokens share it."""
    router, sight = subject.router(), subject.seen.copy()
    before = sight.copy()
    with torch.no_grad():
        outputs(router, sight)
    for name in PARTS:
        if not torch.equal(getattr(sight.context, name), getattr(before.context, name)):
            raise Failed(f"{subject.asked} changes context.{name} in place; work on a new tensor, as x = x + 1 does.")
    if not torch.equal(sight.arriving, before.arriving):
        raise Failed("gate changes the hidden state in place; work on a new tensor, as x = x + 1 does.")
    return "unchanged"


@check("the same answer to the same context", context)
def repeatable(subject: Subject) -> str:
    """Now, after other contexts, and whatever random numbers were drawn meanwhile."""
    router, seen = subject.router(), subject.seen
    with seeded(0):
        first = answer(router, seen)
    answer(router, seen.map(lambda x: x.flip(-1)))
    with seeded(1):
        again = answer(router, seen)
    if not torch.equal(first, again):
        raise Failed(
            f"{subject.asked} gives another answer to the same context the second time; draw random numbers "
            "in __init__ or calibrate only, and remember nothing between calls."
        )
    return "to the bit"


@check("each row is answered for its own K", repeatable)
def mixed(subject: Subject) -> str:
    """Rows of a batch may ask for different ones."""
    router, seen, depths = subject.router(), subject.seen, subject.depths
    among = torch.arange(ROWS * len(depths)).reshape(-1, ROWS) % len(depths)
    for executed in torch.tensor(depths)[among].to(seen.arriving.device):
        given = answer(router, seen.at(executed[:, None]))
        for row, depth in enumerate(executed.tolist()):
            if not _nearly_all(given[row], answer(router, seen.at(depth))[row]):
                raise Failed(
                    "The answer for a row changes with what other rows ask for; use context.executed of each token, "
                    "not that of the first or the largest."
                )
    return f"{len(among)} batches"


@check("rounding does not change the order of layers", mixed)
def stable(subject: Subject) -> str:
    """A change of a millionth; otherwise decoding would not follow the plans of training."""
    router, seen, generator = subject.router(), subject.seen, torch.Generator().manual_seed(0)
    jittered = seen.map(lambda x: x * (1 + JITTER * torch.randn(x.shape, generator=generator).to(x)))
    turned = _turned(router, answer(router, seen), answer(router, jittered))
    if turned > RARE:
        raise Failed(
            f"A change of {JITTER:g} in the context, as rounding makes it, changes the plan of {turned:.0%} of "
            "the tokens; let the answer hang smoothly on the context, with no hashing and no differences of "
            "large numbers."
        )
    return f"{1 - turned:.0%} of tokens"


@check("nothing from later tokens", stable)
def causal(subject: Subject) -> str:
    """Other tokens from some position on leave every answer before it as it was."""
    position = torch.arange(LENGTH, device=subject.windows.device)
    for answers in _ways(subject.router()):
        seen = answers(subject.seen)
        for cut in range(1, LENGTH):
            later = answers(subject.seen.blend(subject.unlike, (position >= cut).expand(ROWS, -1)))
            if not alike(seen[:, :cut], later[:, :cut]).all():
                raise Failed(
                    f"The answer for a token changes with the tokens after it; {subject.asked} may combine nothing "
                    "along the dimension of tokens (no mean, softmax or norm over it): pooled holds the prefix."
                )
    return "unchanged before each cut"


@check("nothing from other rows of a batch", causal)
def rows(subject: Subject) -> str:
    """Other tokens in one row leave the answers for the others as they were."""
    row = torch.arange(ROWS, device=subject.windows.device)
    for answers in _ways(subject.router()):
        seen = answers(subject.seen)
        for changed in range(ROWS):
            here = (row == changed)[:, None].expand(-1, LENGTH)
            others = answers(subject.seen.blend(subject.unlike, here))
            if not alike(seen, others)[~here].all():
                raise Failed(
                    f"The answer for a row changes with other rows of the batch; {subject.asked} may combine nothing "
                    "along the dimension of rows (no mean, batch norm or softmax over it)."
                )
    return "unchanged"


@check("a token alone is answered as among others", rows)
def alone(subject: Subject) -> str:
    """What decoding asks: one token, without those before it."""
    router, seen = subject.router(), subject.seen
    whole, same = answer(router, seen), []
    for token in range(LENGTH):
        row = token % ROWS
        for part in (seen[row, token], seen[row : row + 1, token : token + 1]):
            same.append(bool(alike(answer(router, part).reshape(-1), whole[row, token])))
    if same.count(False) > RARE * len(same):
        raise Failed(
            f"A token shown alone, as in decoding, gets another answer than among others; {subject.asked} may "
            "use nothing but the token's own entries of the context, not those of earlier tokens or their number."
        )
    return f"{len(same)} tokens"


@check("the kind that it says it is", alone)
def kind(subject: Subject) -> str:
    """A static router has one order for all tokens."""
    given = answer(subject.router(), subject.seen)
    if subject.cls.kind == "static" and not alike(given, given[:1, :1]).all():
        raise Failed('kind is \'static\', but the answer hangs on the token; set kind = "learned", or "random".')
    return subject.cls.kind


@torch.no_grad()
def _asked(router: AnyRouter, sight: Sight) -> list[Any]:
    return outputs(router, sight.copy())


def _any_leading(subject: Subject, router: AnyRouter, sight: Sight) -> list[Any]:
    """What it gives; raises `Failed` with the leading dimensions that it cannot bear."""
    try:
        return _asked(router, sight)
    except Exception as error:
        raise Failed(
            f"{raised(error, subject.cls)} for leading dimensions {sight.leading}; {subject.asked} takes any, from () "
            "to (B, T): count dimensions from the last, and combine nothing along the others."
        ) from error


def _ways(router: AnyRouter) -> Iterator[Callable[[Sight], Tensor]]:
    """Its answer as it serves and, where it is trained, as in training: batch norm mixes tokens only there."""
    yield lambda sight: answer(router, sight)
    if not router.trainable:
        return
    router.train()

    def drawn_alike(sight: Sight) -> Tensor:
        with seeded(0):  # so that dropout leaves out the same
            return answer(router, sight)

    yield drawn_alike


def _form(router: nn.Module) -> str:
    if isinstance(router, Router):
        return (
            "return geometry.routable numbers in the last dimension and keep the others, as "
            "scores.expand(*context.executed.shape, -1) does"
        )
    return "return one logit for each token, without the last dimension of hidden"


def _padding(seen: Sight) -> Sight:
    blank = seen.copy()
    blank.context.pooled[:, 0] = 0.0
    return blank


def _nearly_all(one: Tensor, two: Tensor) -> bool:
    return bool(alike(one, two).float().mean() >= 1 - RARE)


def _turned(router: AnyRouter, one: Tensor, two: Tensor) -> float:
    """The share of tokens whose layers are decided otherwise."""
    return (decisions(router, one) != decisions(router, two)).any(-1).float().mean().item()
