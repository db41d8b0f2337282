"""Perplexity and KL to the dense model per budget, by the causal protocol.

Each window has a prompt, which is read and not scored, and a continuation in which every token is routed on its own
prefix. Sums are kept per document, so that intervals and paired differences resample documents, not tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from buddy import distributed
from buddy.backbone.load import Backbone
from buddy.budget import auto_of
from buddy.data.windows import Windows
from buddy.engine.forward import Output
from buddy.engine.model import RoutedLM
from buddy.engine.twins import head_logits
from buddy.losses import Dense, cross_entropy, kl_to_dense
from buddy.scoring.statistics import quantiles, resamples

Track = Callable[[Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Scores:
    """What one router did at one budget.

    Attributes:
        budget: as asked; "auto" where a budget predictor chose for each window.
        layers: K, executed layers that the budget stands for; for "auto" the mean over tokens, rounded.
        executed: least, mean and most layers that tokens really ran, prompts included and sinks left out.
        sinks: tokens per window at full depth whatever the budget.
        loss: (documents,) summed next-token cross-entropy in nats.
        kl: (documents,) summed KL to the dense model in nats.
        tokens: (documents,) scored tokens.
        chosen: of "auto", K → windows for which it was chosen.
    """

    budget: float | str
    layers: int
    executed: tuple[int, float, int]
    sinks: int
    loss: np.ndarray
    kl: np.ndarray
    tokens: np.ndarray
    chosen: Mapping[int, int] | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy over all tokens."""
        return math.exp(self.loss.sum() / self.tokens.sum())

    @property
    def mean_kl(self) -> float:
        """Mean KL to the dense model in nats a token."""
        return float(self.kl.sum() / self.tokens.sum())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the perplexity over documents (percentile method)."""
        drawn = resamples(len(self.tokens))
        return quantiles(np.exp(self.loss[drawn].sum(1) / self.tokens[drawn].sum(1)), level)


@torch.no_grad()
def evaluate(
    routed: RoutedLM,
    windows: Windows,
    budgets: Sequence[float | str],
    *,
    prompt: int,
    batch_size: int = 4,
    track: Track = iter,
    reference: Reference | None = None,
) -> list[Scores]:
    """Scores of the model's router at each budget.

    Processes that are together share the batches out and all get all scores: to the last bit those of one alone that
    computes each batch alike, since sums are taken in the order of the windows, whoever measured them.

    Args:
        routed: model and router, alike in all processes.
        windows: held-out text.
        budgets: fractions, each of which becomes K layers; or "auto", which chooses K for each window from its prompt.
        prompt: tokens of each window that are not scored.
        batch_size: windows per forward.
        track: wraps the list of batches to show progress.
        reference: keeps what all routers share, where several are evaluated on the same windows in the same way.
    """
    asked: dict[Any, Any] = {each: each if auto_of(each) else routed.executed_layers(each) for each in budgets}
    choosing = {each: routed.choosing(str(each)) for each in budgets if auto_of(each)}
    reference = Reference(most=0) if reference is None else reference
    shared = reference.full if routed.adapter is None else None  # each adapter changes full depth in its own way
    full = {routed.geometry.layers: shared} if shared else {}
    tallies = {key: _Tally(windows) for key in asked.values() if key not in full}
    batches, ours = torch.arange(len(windows)).split(batch_size), {}
    scored = torch.arange(prompt - 1, windows.input_ids.shape[1] - 1, device=routed.backbone.device)
    for number in track(distributed.shared_out(len(batches))) if tallies else ():
        rows = batches[number]
        ids = windows.input_ids[rows].to(routed.backbone.device)
        with routed.stock():
            dense = Dense(reference.dense(routed.backbone, int(rows[0]), ids, scored))
        context = routed.context(ids[:, :prompt]) if choosing else None
        for key in tallies:
            executed = choosing[key](context) if key in choosing else torch.full((len(ids),), key)
            output = routed(ids, executed=executed, prompt=prompt, logits_to_keep=scored)
            losses = cross_entropy(output.logits, ids[:, scored + 1]), kl_to_dense(dense, output.logits)
            ours[number, key] = _Measured.of(output, *losses, executed if key in choosing else None)
    measured = dict(item for part in distributed.gather(ours) for item in part.items())
    for number, rows in enumerate(batches):
        for key, tally in tallies.items():
            tally.add(rows, measured[number, key])
    found = full | {key: tally.scores(key) for key, tally in tallies.items()}
    if routed.adapter is None:
        reference.full = found.get(routed.geometry.layers)
    return [replace(found[asked[budget]], budget=budget) for budget in budgets]


@dataclass(frozen=True)
class _Measured:
    """A batch under one budget: sums over the tokens of each window, layers that tokens ran, K chosen for windows."""

    loss: list[float]
    kl: list[float]
    tokens: int
    least: int
    most: int
    total: int
    counted: int
    sinks: int
    chosen: list[int]

    @classmethod
    def of(cls, output: Output, loss: Tensor, kl: Tensor, chosen: Tensor | None) -> _Measured:
        """From losses (B, S) of a routed forward."""
        ran = output.executed[~output.sinks]
        counts = int(ran.min()), int(ran.max()), int(ran.sum()), ran.numel(), int(output.sinks[0].sum())
        losses, kls = ([row.sum(dtype=torch.float64).item() for row in each.cpu()] for each in (loss, kl))
        return cls(losses, kls, loss.shape[1], *counts, [] if chosen is None else chosen.tolist())


class _Tally:
    """Sums per document."""

    def __init__(self, windows: Windows) -> None:
        documents = windows.documents.unique()
        self._place = {int(d): i for i, d in enumerate(documents)}
        self._documents = windows.documents
        self._loss, self._kl, self._tokens = (np.zeros(len(documents)) for _ in range(3))
        self._least, self._most, self._sum, self._n, self._sinks = math.inf, 0, 0, 0, 0
        self._chosen: Counter[int] = Counter()

    def add(self, rows: Tensor, batch: _Measured) -> None:
        for row, loss, kl in zip(rows, batch.loss, batch.kl, strict=True):
            place = self._place[int(self._documents[row])]
            self._loss[place] += loss
            self._kl[place] += kl
            self._tokens[place] += batch.tokens
        self._least, self._most = min(self._least, batch.least), max(self._most, batch.most)
        self._sum, self._n, self._sinks = self._sum + batch.total, self._n + batch.counted, batch.sinks
        self._chosen.update(batch.chosen)

    def scores(self, asked: int | str) -> Scores:
        mean = self._sum / self._n
        executed = (int(self._least), mean, self._most)
        layers, chosen = (round(mean), dict(self._chosen)) if isinstance(asked, str) else (asked, None)
        return Scores(1.0, layers, executed, self._sinks, self._loss, self._kl, self._tokens, chosen)


MOST = 2**30  # bytes


class Reference:
    """Keeps the dense model's last hidden states of a text, and the scores of full depth, which all routers share.

    Hidden states are kept rather than logits, which take a hundred times their memory and cost a fifth of a small
    model's pass. At full depth every router has the same plan, whatever its scores, so it runs once.

    One object is for one backbone, one set of windows, and one way of cutting them into batches and scoring them.

    Args:
        most: bytes of hidden states that are kept; those beyond are computed again for each router.

    Attributes:
        full: scores at full depth, once a router was evaluated there.
    """

    def __init__(self, most: int = MOST) -> None:
        self.full: Scores | None = None
        self._states: dict[int, Tensor] = {}
        self._room = most

    @torch.no_grad()
    def dense(self, backbone: Backbone, batch: int, ids: Tensor, keep: Tensor) -> Tensor:
        """Logits (B, T', V) of the stock model at some positions of a batch (B, T), which its number tells apart."""
        states = self._states.get(batch)
        if states is None:
            states = backbone.base(input_ids=ids, use_cache=False).last_hidden_state[:, keep]
            if states.nbytes <= self._room:
                self._room -= states.nbytes
                self._states[batch] = states.cpu()
        return head_logits(backbone.model, states.to(ids.device))


def as_json(scores: Sequence[Scores]) -> dict[str, Any]:
    """{"results": [one entry a budget]}; losses in nats, `interval` is the perplexity's 95 % bootstrap interval."""
    return {"results": [_entry(each) for each in scores]}


def with_documents(scores: Sequence[Scores]) -> dict[str, Any]:
    """`as_json` and beside it "documents": for each budget the sums over the tokens of every document."""
    documents = [
        {"budget": s.budget, "loss": s.loss.tolist(), "kl": s.kl.tolist(), "tokens": s.tokens.tolist()} for s in scores
    ]
    return as_json(scores) | {"documents": documents}


def scores_of(saved: Mapping[str, Any]) -> list[Scores]:
    """The scores that `with_documents` was given, to the bit.

    Raises:
        KeyError, TypeError, ValueError: it has another form.
    """
    return [_scores(*pair) for pair in zip(saved["results"], saved["documents"], strict=True)]


def _scores(result: Mapping[str, Any], sums: Mapping[str, Any]) -> Scores:
    executed = result["executed"]
    loss, kl, tokens = (np.array(sums[name], dtype=np.float64) for name in ("loss", "kl", "tokens"))
    counts = int(executed["min"]), float(executed["mean"]), int(executed["max"])
    return Scores(float(result["budget"]), int(result["layers"]), counts, int(result["sink_tokens"]), loss, kl, tokens)


def _entry(scores: Scores) -> dict[str, Any]:
    least, mean, most = scores.executed
    return {
        "budget": scores.budget,
        "layers": scores.layers,
        "executed": {"min": least, "mean": mean, "max": most},
        "sink_tokens": scores.sinks,
        "perplexity": scores.perplexity,
        "kl": scores.mean_kl,
        "interval": list(scores.interval()),
        "documents": len(scores.tokens),
        "tokens": int(scores.tokens.sum()),
        **({} if scores.chosen is None else {"chosen": {str(k): count for k, count in sorted(scores.chosen.items())}}),
    }
