"""A record of a comparison that no model was needed for."""

from typing import Any

import numpy as np

from buddy.config import flatten
from buddy.metrics.perplexity import Executed, Scores, with_documents
from buddy.schema import Recipe

LAYERS = 8
BUDGETS = {1.0: 8, 0.75: 6, 0.5: 4}
DOCUMENTS = 12
KINDS = {"ours": "learned", "best": "static", "worse[a=1;b=2]": "static", "dice": "random", "full": "static"}
# Mean cross-entropy at 0.75 and at 0.5, by router and then by seed.
MEANS = {
    "ours": ([3.0, 3.1], [4.0, 4.2]),
    "best": ([3.2], [4.05]),
    "worse[a=1;b=2]": ([3.6], [4.0]),
    "dice": ([5.0, 9.0], [11.0, 14.0]),
    "full": ([], []),
}
DENSE = 2.5
RIGHT = {"ours": (9, 8), "best": (6,), "worse[a=1;b=2]": (5,), "dice": (2, 3), "full": (9,)}  # of ten, by seed
ANSWERS = {
    (label, seed): {"piqa": [1] * count + [0] * (10 - count), "boolq": [0] * (9 - count) + [1] * (count + 1)}
    for label, counts in RIGHT.items()
    for seed, count in enumerate(counts)
}


def scores(budget: float, mean: float, seed: int = 0) -> Scores:
    """Documents whose mean is exactly `mean`, and that differ a little from router to router."""
    tokens = np.full(DOCUMENTS, 10.0)
    common = np.linspace(-0.5, 0.5, DOCUMENTS)
    own = 0.02 * np.random.default_rng(seed).standard_normal(DOCUMENTS)
    layers = BUDGETS[budget]
    loss = 10 * (mean + common + own - own.mean())
    return Scores(budget, layers, Executed(layers, float(layers), layers, float(layers)), 1, loss, loss / 50, tokens)


def run(label: str, seed: int) -> dict[str, Any]:
    """One run of the record; the second text is 0.25 nats harder."""
    domains = {}
    for place, domain in enumerate(("speeches", "web")):
        found = [scores(1.0, DENSE + place / 4)]
        for budget, means in zip((0.75, 0.5), MEANS[label], strict=True):
            if means:
                found.append(scores(budget, means[seed] + place / 4, seed=len(label) + seed))
        domains[domain] = with_documents(found)
    tasks = [
        {"task": task, "budget": budget, "layers": k, "metric": "acc", "value": sum(right) / 10, "correct": right}
        for task, right in ANSWERS[label, seed].items()
        for budget, k in BUDGETS.items()
        if label != "full" or budget == 1.0
    ]
    fit = {"seconds": 10.0 + seed, "parameters": 1234 if label == "ours" else 0}
    return {"router": label, "seed": seed, "fit": fit, "domains": domains, "tasks": tasks}


def record() -> dict[str, Any]:
    """Five routers, two texts, two tasks, times, and a run that failed."""
    times = {"prefill_ms": 40.0, "prefill_spread": [39.0, 41.0], "decode_ms": 10.0, "decode_spread": [9.0, 11.0]}
    times |= {"multiply_adds": 71.5}
    speed = [
        {"router": label, "layers": k} | times | {"decode_layers": float(k)}
        for label in KINDS
        if label != "full"
        for k in (6, 4)
    ]
    return {
        "format": 1,
        "command": "buddy compare --recipe quickstart --routers all",
        "created": "2026-01-02T03:04:05+00:00",
        "recipe": flatten(Recipe()),
        "layers": LAYERS,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": {"processor": "Some CPU", "cores": 2, "memory_gib": 15.5, "accelerator": None},
        "domains": [
            {
                "label": name,
                "source": name,
                "own": name == "speeches",
                "windows": 20,
                "documents": DOCUMENTS,
                "fingerprint": f"of {name}",
            }
            for name in ("speeches", "web")
        ],
        "tasks": {"names": ["piqa", "boolq"], "limit": 50},
        "routers": [
            {
                "label": label,
                "folder": f"folder-of-{label.partition('[')[0]}",
                "name": label.partition("[")[0],
                "options": {"a": 1} if "[" in label else {},
                "kind": kind,
                "source": "–",
                "full_depth": label == "full",
            }
            for label, kind in KINDS.items()
        ],
        "runs": [run(label, seed) for label, (means, _) in MEANS.items() for seed in range(max(1, len(means)))],
        "speed": {
            "tokens": 256,
            "prompt": 64,
            "steps": 32,
            "rounds": 3,
            "threads": 2,
            "dense": times | {"decode_ms": 20.0},
            "full": times | {"decode_ms": 25.0},
            "results": speed,
        },
        "failures": [{"router": "broken", "seed": 0, "reason": "ValueError: it is broken; all of it is in /tmp/x."}],
    }
