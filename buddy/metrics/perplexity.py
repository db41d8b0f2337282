"""Perplexity and KL to the dense model per budget, by the causal protocol.

Each window has a prompt, which is read and not scored, and a continuation in which every token is routed on its own
prefix. `measure` gives one row per window and budget; `scores_from` adds rows up in the order of windows, so that the
result is the same to the bit whichever process measured which window. Sums are kept per document, so that intervals and
paired differences resample documents, not tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from buddy.backbone.load import Backbone
from buddy.budget import auto_cap
from buddy.engine.model import RoutedLM
from buddy.engine.shared_weights import head_logits
from buddy.losses import DenseDistribution, kl_and_cross_entropy
from buddy.metrics.statistics import quantiles, resamples

MAX_STATE_BYTES = 2**30  # bytes of the dense model's hidden states


class Executed(NamedTuple):
    """Layers that tokens ran: least, mean and most, prompts included and sinks left out; and the mean of scored ones.

    A scored token is one whose next token is predicted for the score.
    """

    min: int
    mean: float
    max: int
    scored: float


@dataclass(frozen=True)
class Scores:
    """The results of one router at one budget.

    Attributes:
        budget: a fraction; "auto" where a budget predictor chose for each window.
        layers: K, the executed layers of the budget; for "auto" the mean over tokens, rounded.
        executed: layers that tokens ran.
        sinks: tokens per window that run at full depth at every budget.
        loss: (documents,) summed next-token cross-entropy in nats.
        kl: (documents,) summed KL to the dense model in nats.
        tokens: (documents,) scored tokens.
        chosen: number of windows for each K that "auto" chose; None for a fixed budget.
    """

    budget: float | str
    layers: int
    executed: Executed
    sinks: int
    loss: np.ndarray
    kl: np.ndarray
    tokens: np.ndarray
    chosen: Mapping[int, int] | None = None

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return float(self.loss.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float:
        """exp of `mean_loss`."""
        return math.exp(self.mean_loss)

    @property
    def mean_kl(self) -> float:
        """Mean KL to the dense model in nats per token."""
        return float(self.kl.sum() / self.tokens.sum())

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the perplexity over documents (percentile method)."""
        drawn = resamples(len(self.tokens))
        return quantiles(np.exp(self.loss[drawn].sum(1) / self.tokens[drawn].sum(1)))


@dataclass(frozen=True)
class WindowResult:
    """One window at one budget.

    Attributes:
        window: its number.
        document: number of its document.
        key: K, or a budget "auto".
        loss, kl: sums over the scored tokens, in nats.
        tokens: scored tokens.
        ran: number of tokens, sinks left out, for each number of layers that tokens ran.
        scored: sum of the layers that the scored tokens ran.
        sinks: tokens that run at full depth at every budget.
        chosen: K that "auto" chose; None for a fixed budget.
    """

    window: int
    document: int
    key: int | str
    loss: float
    kl: float
    tokens: int
    ran: Counter[int]
    scored: int
    sinks: int
    chosen: int | None = None


class Reference:
    """Shared by all routers on the same windows: the dense model's last hidden states, and the rows at full depth.

    Hidden states are stored and not logits, which take a hundred times the memory and cost a fifth of a small model's
    forward. At full depth every router has the same plan, so it runs once; an adapter changes full depth, so rows of
    adapted models are not stored. Under sharding no states are stored: all processes must run each forward of the dense
    model, since they gather its weights together.

    One object is for one backbone.

    Attributes:
        full_depth: rows at full depth, by the batch's tokens and scored positions as bytes, the numbers of its windows
            and documents, and the number of sinks.

    Args:
        max_bytes: of hidden states to store; further ones are computed again for each router.
    """

    def __init__(self, max_bytes: int = MAX_STATE_BYTES) -> None:
        self._states: dict[bytes, Tensor] = {}
        self.full_depth: dict[tuple[bytes, tuple[int, ...], int], list[WindowResult]] = {}
        self._room = max_bytes

    @torch.no_grad()
    def dense(self, backbone: Backbone, ids: Tensor, keep: Tensor) -> Tensor:
        """Logits (B, T', V) of the stock model at the positions `keep` of a batch (B, T)."""
        key = _key(ids, keep)
        states = self._states.get(key)
        if states is None:
            states = backbone.base(input_ids=ids, use_cache=False).last_hidden_state[:, keep]
            if states.nbytes <= self._room and not backbone.sharded:
                self._room -= states.nbytes
                self._states[key] = states.cpu()
        return head_logits(backbone.model, states.to(ids.device))


@torch.no_grad()
def measure(
    model: RoutedLM,
    ids: Tensor,
    windows: Sequence[int],
    documents: Sequence[int],
    keys: Iterable[int | str],
    *,
    prompt: int,
    reference: Reference,
) -> list[WindowResult]:
    """Rows of a batch of windows under the model's router, for each K and for each budget "auto".

    Args:
        ids: (B, T) long, on the model's device.
        windows, documents: (B,) numbers of the windows, and of the documents that they come from.
        keys: K, or "auto" and "auto:0.75", which choose K for each window from its prompt.
        prompt: tokens at the start of each window that are not scored.
        reference: gives the dense model's logits.
    """
    scored = torch.arange(prompt - 1, ids.shape[1] - 1, device=ids.device)
    targets, layers, rows = ids[:, scored + 1], model.geometry.layers, []
    dense: DenseDistribution | None = None
    context, batch = None, (_key(ids, scored), (*windows, *documents), model.sink_tokens)
    for key in keys:
        shared = key == layers and model.adapter is None
        if shared and batch in reference.full_depth:
            rows += reference.full_depth[batch]
            continue
        if dense is None:
            with model.stock():
                dense = DenseDistribution(reference.dense(model.backbone, ids, scored))
        if isinstance(key, str):
            context = model.context(ids[:, :prompt]) if context is None else context
            executed = model.choosing(key)(context)
        else:
            executed = torch.full((len(ids),), key)
        output = model(ids, executed=executed, prompt=prompt, logits_to_keep=scored)
        losses = kl_and_cross_entropy(dense, output.logits, targets)
        kl, loss = ([row.sum(dtype=torch.float64).item() for row in each.cpu()] for each in losses)
        new = [
            WindowResult(
                window,
                document,
                key,
                loss=loss[row],
                kl=kl[row],
                tokens=len(scored),
                ran=Counter(output.executed[row][~output.sinks[row]].tolist()),
                scored=int(output.executed[row, scored].sum()),
                sinks=int(output.sinks[row].sum()),
                chosen=int(executed[row]) if isinstance(key, str) else None,
            )
            for row, (window, document) in enumerate(zip(windows, documents, strict=True))
        ]
        rows += new
        if shared:
            reference.full_depth[batch] = new
    return rows


def keys_of(model: RoutedLM, budgets: Iterable[float | str]) -> dict[float | str, int | str]:
    """For each budget the key of `measure`: K, or "auto" unchanged.

    Raises:
        BudgetError: out of range, or "auto" without a budget predictor, before a latency is measured.
    """
    for budget in budgets:
        if auto_cap(budget):
            model.choosing(str(budget))
    return {budget: str(budget) if auto_cap(budget) else model.executed_layers(budget) for budget in budgets}


def scores_from(rows: Iterable[WindowResult], keys: Mapping[float | str, int | str]) -> list[Scores]:
    """Scores for each budget in `keys`, from the rows of all windows in any order; rows that come twice count once."""
    by_key: dict[int | str, dict[int, WindowResult]] = {key: {} for key in keys.values()}
    for row in rows:
        by_key[row.key][row.window] = row
    return [_scores_at(budget, key, [row for _, row in sorted(by_key[key].items())]) for budget, key in keys.items()]


def _scores_at(budget: float | str, key: int | str, rows: Sequence[WindowResult]) -> Scores:
    _, places = np.unique([row.document for row in rows], return_inverse=True)
    loss, kl, tokens = (np.bincount(places, [getattr(row, name) for row in rows]) for name in ("loss", "kl", "tokens"))
    ran = sum((row.ran for row in rows), Counter())
    mean = sum(layers * number for layers, number in ran.items()) / ran.total()
    executed = Executed(min(ran), mean, max(ran), sum(row.scored for row in rows) / float(tokens.sum()))
    chosen = dict(Counter(row.chosen for row in rows)) if isinstance(key, str) else None
    layers = round(mean) if isinstance(key, str) else key
    return Scores(budget, layers, executed, rows[-1].sinks, loss, kl, tokens, chosen)


def _key(ids: Tensor, scored: Tensor) -> bytes:
    device = ids.device.type
    precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
    return b"".join(each.cpu().numpy().tobytes() for each in (ids, scored)) + precision.encode()


def as_json(scores: Sequence[Scores]) -> dict[str, Any]:
    """{"results": [one entry a budget]}; losses in nats, `interval` is the perplexity's 95 % bootstrap interval."""
    return {"results": [_entry(each) for each in scores]}


def with_documents(scores: Sequence[Scores]) -> dict[str, Any]:
    """`as_json` and "documents": for each budget the sums over the tokens of every document."""
    documents = [
        {"budget": s.budget, "loss": s.loss.tolist(), "kl": s.kl.tolist(), "tokens": s.tokens.tolist()} for s in scores
    ]
    return as_json(scores) | {"documents": documents}


def _entry(scores: Scores) -> dict[str, Any]:
    return {
        "budget": scores.budget,
        "layers": scores.layers,
        "executed": scores.executed._asdict(),
        "sink_tokens": scores.sinks,
        "perplexity": scores.perplexity,
        "kl": scores.mean_kl,
        "interval": list(scores.interval()),
        "documents": len(scores.tokens),
        "tokens": int(scores.tokens.sum()),
        **({} if scores.chosen is None else {"chosen": {str(k): count for k, count in sorted(scores.chosen.items())}}),
    }
