"""Scores as JSON and back: what people read of them, and the sums per document that all statistics can be made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from buddy.evaluation.perplexity import Scores


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
