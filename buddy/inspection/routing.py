"""The plans that ran for the tokens of a text, and measures of these plans."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from buddy.builders.data import build_unseen, held_out
from buddy.console import Track
from buddy.data.text import same_source
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import DataError, check_text
from buddy.router import Geometry
from buddy.run import Run

SKIPPED, CHOSEN, ALWAYS, SINK = range(4)  # what a layer is to a token
SPAN = 128  # tokens among which distinct plans are counted


@dataclass(frozen=True)
class Measures:
    """Numbers of one text at one budget. Shares are from 0 to 1; sinks are left out of all.

    Attributes:
        tokens: routed tokens.
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
    share: tuple[float, ...]
    plans: int
    changes: float | None
    apart: float | None
    span: int
    distinct: float
    commonest: float
    off_commonest: float

    @classmethod
    def of(cls, plans: np.ndarray, reference: np.ndarray, always_on: int) -> Measures:
        """The numbers of a text.

        Args:
            plans: (N, T, L) bool, of the routed tokens, at least one.
            reference: (L,) bool, the plan for `off_commonest`.
            always_on: layers that every plan runs.
        """
        rows, tokens, _ = plans.shape
        _, numbers, counts = np.unique(_packed(plans), axis=0, return_inverse=True, return_counts=True)
        differing = (plans[:, 1:] != plans[:, :-1]).sum(-1)
        span = min(SPAN, tokens)
        starts = np.linspace(0, tokens - span, -(-tokens // span)).round().astype(int)  # stretches cover each window
        stretches = [row[start : start + span] for row in numbers.reshape(rows, tokens) for start in starts]
        chosen = int(plans.sum()) - rows * tokens * always_on
        return cls(
            tokens=rows * tokens,
            share=tuple(plans.mean((0, 1)).tolist()),
            plans=len(counts),
            changes=float((differing > 0).mean()) if differing.size else None,
            apart=float(differing.mean()) if differing.size else None,
            span=span,
            distinct=float(np.mean([len(np.unique(stretch)) for stretch in stretches])),
            commonest=float(counts.max() / (rows * tokens)),
            off_commonest=float((plans & ~reference).sum() / chosen) if chosen else 0.0,
        )


def commonest_plan(plans: np.ndarray) -> np.ndarray:
    """(L,) bool, the most frequent of (..., L) plans; of equally frequent ones, that with later layers."""
    distinct, counts = np.unique(_packed(plans), axis=0, return_counts=True)
    return np.unpackbits(distinct[counts.argmax()], count=plans.shape[-1]).astype(bool)


def _packed(plans: np.ndarray) -> np.ndarray:
    """(N, bytes) uint8 for N plans, a bit for each layer."""
    return np.packbits(plans.reshape(-1, plans.shape[-1]), axis=-1)


@dataclass(frozen=True)
class TextWindows:
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


def read_text(run: Run, routed: RoutedLM, label: str, source: str, count: int) -> TextWindows:
    """Up to `count` windows of a source, as `buddy evaluate` cuts them; of the recipe's own text, its test windows.

    Raises:
        DataError: the text cannot be read, or is too short for one window.
        RunError: the recipe's own text has changed (`held_out`).
    """
    section = run.recipe.data
    if same_source(source, section.source):  # the other windows were learned from
        windows = held_out(run, routed.backbone).test[:count]
    else:
        windows = build_unseen(run, routed.backbone.tokenizer, source, count=count)
    return TextWindows(label, source, windows, section.prompt)


def typed_text(routed: RoutedLM, text: str) -> TextWindows:
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
    return TextWindows("text", None, Windows(ids, torch.zeros(1, dtype=torch.long)), tokens)


@torch.no_grad()
def observe(
    routed: RoutedLM, texts: Sequence[TextWindows], counts: Iterable[int], *, batch_size: int = 4, track: Track = iter
) -> dict[tuple[str, int], np.ndarray]:
    """(N, T, L) bool for N windows: the layers that ran, by label of the text and executed layers K.

    Args:
        routed: model and router.
        texts: to run.
        counts: each K to run at.
        batch_size: windows per forward.
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
    return {key: np.concatenate(parts) for key, parts in found.items()}


@dataclass(frozen=True)
class Inspection:
    """The plans of one run.

    Attributes:
        router: its name.
        geometry: sizes of the backbone.
        sinks: first tokens of each window, at full depth at every budget; they are left out of all measures.
        mean_over: tokens that run K layers in the mean; 1 where each runs exactly K.
        executed: K by budget, deepest first.
        texts: what ran, in windows of one length.
        runs: (N, T, L) bool, what ran, by label of the text and K.
        words: short texts of the tokens of the first text's first window.
    """

    router: str
    geometry: Geometry
    sinks: int
    mean_over: int
    executed: Mapping[str, int]
    texts: Sequence[TextWindows]
    runs: Mapping[tuple[str, int], np.ndarray]
    words: Sequence[str]

    @property
    def mean(self) -> str:
        """What to write after a number of layers."""
        return f" in the mean over {self.mean_over} tokens" if self.mean_over > 1 else ""

    def plans(self, count: int) -> np.ndarray:
        """(N, T − sinks, L) bool, the plans of the routed tokens of all texts at K."""
        return np.concatenate([self.runs[text.label, count][:, self.sinks :] for text in self.texts])

    def first(self, count: int) -> np.ndarray:
        """(T, L) bool, what ran for the first window at K."""
        return self.runs[self.texts[0].label, count][0]

    def kinds(self, count: int) -> np.ndarray:
        """(T, L), for each token and layer of the first window one of `SKIPPED`, `CHOSEN`, `ALWAYS` and `SINK`."""
        kinds = np.where(self.first(count), CHOSEN, SKIPPED)
        kinds[:, : self.geometry.context_layer] = kinds[:, -1] = ALWAYS
        kinds[: self.sinks] = SINK
        return kinds

    def changed(self, count: int) -> np.ndarray:
        """(T,) layers in which a plan of the first window differs from the one before; 0 up to the first routed one."""
        plans = self.first(count)[self.sinks :]
        return np.pad((plans[1:] != plans[:-1]).sum(-1), (self.sinks + 1, 0))

    @cached_property
    def measures(self) -> dict[int, dict[str, Measures]]:
        """The numbers by K and label of the text."""
        found: dict[int, dict[str, Measures]] = {count: {} for count in self.executed.values()}
        for (label, count), runs in self.runs.items():
            reference = commonest_plan(self.plans(count))
            found[count][label] = Measures.of(runs[:, self.sinks :], reference, self.geometry.always_on)
        return found

    def _executed(self, count: int) -> dict[str, float]:
        """Layers that routed tokens ran at K, least, mean and most."""
        ran = self.plans(count).sum(-1)
        return {"min": int(ran.min()), "mean": float(ran.mean()), "max": int(ran.max())}

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
                "executed": self._executed(count),
                "share": self.plans(count).mean((0, 1)).tolist(),
                "commonest_plan": commonest_plan(self.plans(count)).nonzero()[0].tolist(),
                "domains": {label: asdict(found) for label, found in self.measures[count].items()},
                "text": ["".join("01"[ran] for ran in token) for token in self.first(count).astype(int)],
            }
            for budget, count in self.executed.items()
        ]
        return {
            "router": self.router,
            "layers": self.geometry.layers,
            "always_on": [*range(self.geometry.context_layer), self.geometry.layers - 1],
            "sink_tokens": self.sinks,
            "mean_over": self.mean_over,
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
        batch_size: windows per forward.
        track: wraps the list of forwards to show progress.
    """
    text = TextWindows("text", None, windows, prompt)
    (runs,) = observe(routed, [text], [executed], batch_size=batch_size, track=track).values()
    plans = runs[:, routed.sink_tokens :]
    plan = commonest_plan(plans)
    return tuple(plan.nonzero()[0].tolist()), Measures.of(plans, plan, routed.geometry.always_on)
