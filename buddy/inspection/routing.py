"""The plans that ran for the tokens of a text, and measures of these plans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from buddy.build import build_held_out, build_windows
from buddy.data.text import same_source
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import DataError, check_text
from buddy.router import Geometry
from buddy.run import Run

Track = Callable[[Sequence[Any]], Iterable[Any]]
SPAN = 128  # tokens among which distinct plans are counted


@dataclass(frozen=True)
class Routing:
    """The plans that ran over one text at one budget.

    Attributes:
        runs: (N, T, L) bool for N windows.
        sinks: first tokens of each window, at full depth at every budget; they are left out of all measures.
    """

    runs: np.ndarray
    sinks: int

    @property
    def plans(self) -> np.ndarray:
        """(N, T − sinks, L) bool, the routed tokens alone."""
        return self.runs[:, self.sinks :]


@dataclass(frozen=True)
class Measures:
    """Numbers of one text at one budget. Shares are from 0 to 1; sinks are left out of all.

    Attributes:
        tokens: routed tokens.
        executed: least, mean and most layers of a token.
        share: (L,) tokens that ran each layer, as a share.
        plans: distinct plans in the whole text.
        changes: share of tokens whose plan differs from that of the token before; None without such a token.
        apart: mean number of layers in which these two plans differ (Hamming distance); None without such a token.
        span: tokens in a stretch: 128, or the whole window where it is shorter.
        distinct: mean number of distinct plans in a stretch of `span` tokens.
        commonest: share of tokens whose plan is the text's most frequent one.
        off_commonest: share of the chosen layers (those that run and need not) which the most frequent plan of all
            texts at this budget does not run.
    """

    tokens: int
    executed: tuple[int, float, int]
    share: tuple[float, ...]
    plans: int
    changes: float | None
    apart: float | None
    span: int
    distinct: float
    commonest: float
    off_commonest: float

    @classmethod
    def of(cls, routing: Routing, reference: np.ndarray, always_on: int) -> Measures:
        """The numbers of a text.

        Args:
            routing: what ran, with at least one routed token.
            reference: (L,) bool, the plan for `off_commonest`.
            always_on: layers that every plan runs.
        """
        plans = routing.plans
        executed = plans.sum(-1)
        _, numbers, counts = np.unique(_packed(plans), axis=0, return_inverse=True, return_counts=True)
        differing = (plans[:, 1:] != plans[:, :-1]).sum(-1)
        span, distinct = _distinct(numbers.reshape(plans.shape[:2]))
        chosen = int((executed - always_on).sum())
        return cls(
            tokens=executed.size,
            executed=(int(executed.min()), float(executed.mean()), int(executed.max())),
            share=tuple(plans.mean((0, 1)).tolist()),
            plans=len(counts),
            changes=float((differing > 0).mean()) if differing.size else None,
            apart=float(differing.mean()) if differing.size else None,
            span=span,
            distinct=distinct,
            commonest=float(counts.max() / executed.size),
            off_commonest=float((plans & ~reference).sum() / chosen) if chosen else 0.0,
        )


def commonest_plan(routings: Sequence[Routing]) -> np.ndarray:
    """(L,) bool, the most frequent plan over all routed tokens; of equally frequent ones, that with later layers."""
    packed = np.concatenate([_packed(routing.plans) for routing in routings])
    distinct, counts = np.unique(packed, axis=0, return_counts=True)
    return np.unpackbits(distinct[counts.argmax()], count=routings[0].runs.shape[-1]).astype(bool)


def pooled_share(routings: Sequence[Routing]) -> np.ndarray:
    """(L,) share of the routed tokens of all texts together that ran each layer."""
    return np.concatenate([routing.plans.reshape(-1, routing.runs.shape[-1]) for routing in routings]).mean(0)


def changed_layers(runs: np.ndarray, sinks: int) -> np.ndarray:
    """(T,) layers in which each token's plan differs from that of the token before; 0 up to the first routed token.

    Args:
        runs: (T, L) bool.
        sinks: first tokens at full depth at every budget.
    """
    changed = np.zeros(len(runs), dtype=int)
    changed[sinks + 1 :] = (runs[sinks + 1 :] != runs[sinks:-1]).sum(-1)
    return changed


def _packed(plans: np.ndarray) -> np.ndarray:
    """(N · T, bytes) uint8, a bit for each layer."""
    return np.packbits(plans.reshape(-1, plans.shape[-1]), axis=-1)


def _distinct(numbers: np.ndarray) -> tuple[int, float]:
    """Tokens in a stretch, and the mean number of distinct plans in one.

    As many stretches as cover each window (N, T), evenly spaced, so that they may overlap.
    """
    tokens = numbers.shape[1]
    span = min(SPAN, tokens)
    starts = np.linspace(0, tokens - span, -(-tokens // span)).round().astype(int)
    found = [len(np.unique(row[start : start + span])) for row in numbers for start in starts]
    return span, float(np.mean(found))


@dataclass(frozen=True)
class Text:
    """Windows of one text.

    Attributes:
        label: its name in tables and figures.
        source: where it was read from; None for a text typed by the user.
        windows: (N, W) tokens of it.
        prompt: tokens at the start of each window that share a plan where prompts do.
    """

    label: str
    source: str | None
    windows: Windows
    prompt: int


def read_text(run: Run, routed: RoutedLM, label: str, source: str, count: int) -> Text:
    """Up to `count` windows of a source, as `buddy evaluate` cuts them; of the recipe's own text, its test windows.

    Raises:
        DataError: the text cannot be read, or is too short for one window.
    """
    section = run.recipe.data
    if same_source(source, section.source):  # the other windows were learned from
        windows = build_held_out(run.recipe, routed.backbone).test[:count]
    else:
        windows = build_windows(run.recipe, routed.backbone.tokenizer, source, count=count)
    return Text(label, source, windows, section.prompt)


def typed_text(routed: RoutedLM, text: str) -> Text:
    """One window with exactly this text; all of it is the prompt, as in `buddy generate`.

    Raises:
        DataError: the text is too short for one routed token, or longer than the backbone reads.
    """
    check_text(text, "The text to look at")
    ids = routed.backbone.tokenizer(text, return_tensors="pt").input_ids
    tokens, most = ids.shape[1], routed.backbone.context_length
    if tokens <= routed.sink_tokens:
        raise DataError(
            f"The text has too few tokens, {tokens}: the first {routed.sink_tokens} run at full depth at every "
            "budget (routing.sink_tokens); give a longer one."
        )
    if tokens > most:
        raise DataError(f"The text has {tokens} tokens, but {routed.backbone.name} reads at most {most}; shorten it.")
    return Text("text", None, Windows(ids, torch.zeros(1, dtype=torch.long)), tokens)


@torch.no_grad()
def observe(
    routed: RoutedLM, texts: Sequence[Text], counts: Iterable[int], *, batch_size: int = 4, track: Track = iter
) -> dict[tuple[str, int], Routing]:
    """The plans that ran, by label of the text and executed layers K.

    Args:
        routed: model and router.
        texts: to run.
        counts: each K to run at.
        batch_size: windows a forward.
        track: wraps the list of forwards to show progress.
    """
    forwards = [
        (text, count, rows)
        for text in texts
        for rows in torch.arange(len(text.windows)).split(batch_size)
        for count in dict.fromkeys(counts)
    ]
    found: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for text, count, rows in track(forwards):
        ids = text.windows.input_ids[rows].to(routed.backbone.device)
        output = routed(ids, executed=torch.full((len(ids),), count), prompt=text.prompt, logits_to_keep=1)
        if not torch.equal(output.runs.sum(-1), output.executed):
            raise RuntimeError("The layers that ran are not those of the plan.")
        found[text.label, count].append(output.runs.cpu().numpy())
    return {key: Routing(np.concatenate(parts), routed.sink_tokens) for key, parts in found.items()}


@dataclass(frozen=True)
class Inspection:
    """The plans of one run.

    Attributes:
        router: its name.
        geometry: sizes of the backbone.
        executed: K by budget, deepest first.
        texts: what ran.
        routings: the plans, by label of the text and K.
        words: short texts of the tokens of the first text's first window.
    """

    router: str
    geometry: Geometry
    executed: dict[str, int]
    texts: Sequence[Text]
    routings: Mapping[tuple[str, int], Routing]
    words: Sequence[str]

    @property
    def always(self) -> tuple[int, int]:
        """How many layers always run at the beginning and at the end."""
        return self.geometry.context_layer, 1

    @property
    def sinks(self) -> int:
        """First tokens of each window, at full depth at every budget."""
        return next(iter(self.routings.values())).sinks

    def at(self, count: int) -> list[Routing]:
        """The plans at K, text by text."""
        return [self.routings[text.label, count] for text in self.texts]

    @cached_property
    def measures(self) -> dict[int, dict[str, Measures]]:
        """The numbers by K and label of the text."""
        found: dict[int, dict[str, Measures]] = {}
        for count in set(self.executed.values()):
            plan = commonest_plan(self.at(count))
            found[count] = {
                text.label: Measures.of(self.routings[text.label, count], plan, self.geometry.always_on)
                for text in self.texts
            }
        return found

    def as_json(self) -> dict[str, Any]:
        """All numbers; a token's plan is a string of L characters, "1" for a layer that ran."""
        first = self.texts[0]
        domains = {
            text.label: {
                "source": text.source,
                "windows": len(text.windows),
                "tokens_a_window": text.windows.input_ids.shape[1],
                "documents": len(text.windows.documents.unique()),
            }
            for text in self.texts
        }
        budgets = [
            {
                "budget": budget,
                "layers": count,
                "share": pooled_share(self.at(count)).tolist(),
                "commonest_plan": commonest_plan(self.at(count)).nonzero()[0].tolist(),
                "domains": {label: asdict(found) for label, found in self.measures[count].items()},
                "text": [
                    "".join("01"[ran] for ran in token) for token in self.routings[first.label, count].runs[0] * 1
                ],
            }
            for budget, count in self.executed.items()
        ]
        return {
            "router": self.router,
            "layers": self.geometry.layers,
            "always_on": sorted({*range(self.geometry.context_layer), self.geometry.layers - 1}),
            "sink_tokens": self.sinks,
            "domains": domains,
            "text": {"domain": first.label, "tokens": first.windows.input_ids[0].tolist(), "words": [*self.words]},
            "budgets": budgets,
        }


def most_frequent(
    routed: RoutedLM, windows: Windows, executed: int, *, prompt: int, batch_size: int = 4, track: Track = iter
) -> tuple[tuple[int, ...], Measures]:
    """The layers of the plan that most routed tokens of a text have, and the measures of all plans.

    Args:
        routed: model and router.
        windows: of the text.
        executed: K.
        prompt: tokens at the start of each window that share a plan where prompts do.
        batch_size: windows a forward.
        track: wraps the list of forwards to show progress.
    """
    text = Text("text", None, windows, prompt)
    (routing,) = observe(routed, [text], [executed], batch_size=batch_size, track=track).values()
    plan = commonest_plan([routing])
    return tuple(plan.nonzero()[0].tolist()), Measures.of(routing, plan, routed.geometry.always_on)
