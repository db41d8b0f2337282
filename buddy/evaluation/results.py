"""The numbers of a comparison as pandas frames: all of them in long form, and the statistics that tables show.

comparison.json (`buddy.evaluation.record`) is the source; frames, tables and figures are views of it. `buddy fit` has
one seed and one text, `buddy compare` several; the code is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from statistics import mean
from typing import Any

import numpy as np
import pandas as pd

from buddy.backbone.load import title_of
from buddy.metrics.statistics import accuracy_difference, difference, flips, loss_interval, mean_loss

FEWEST = 5  # documents or items that a mark of significance needs

PairedTest = Callable[[Any, Any], tuple[float, tuple[float, float]]]  # a difference and its interval
COLUMNS = ["router", "seed", "text", "budget", "document", "metric", "value"]
# Columns of comparison.csv.
CSV_COLUMNS = (
    *("router", "kind", "seed", "domain", "budget", "layers", "perplexity", "interval_low", "interval_high", "kl"),
    *("executed_min", "executed_mean", "executed_max", "executed_scored"),
    *("documents", "tokens", "fit_seconds", "parameters"),
    *("decode_tokens_per_second", "prefill_tokens_per_second"),
)
WHOLE = ("layers", "executed_min", "executed_max", "documents", "tokens", "parameters")  # columns of whole numbers


class Results:
    """A record and its statistics.

    Args:
        record: the content of comparison.json, or several joined.

    Attributes:
        record: as given.
        frame: all its numbers, one row for each, with the columns router, seed, text, budget, document, metric, value.
            `text` is a task for the metrics "score" and "correct", and missing for the cost of fitting. `document`
            numbers the documents of a text, or the items of a task; it is missing for metrics over all of them.
        routers: name, kind, folder and more of each router that has runs, by label in the order of the rows.
        texts: labels of the texts.
        layers: L of the backbone.
        budgets: K by budget, deepest first.
        below: `budgets` without full depth, where all routers are the dense model.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record, self.layers = record, int(record["layers"])
        self.frame = pd.DataFrame(_rows(record), columns=COLUMNS)
        runs = {run["router"] for run in record["runs"]}
        self.routers = pd.DataFrame(each for each in record["routers"] if each["label"] in runs).set_index("label")
        self.texts = [text["label"] for text in record["domains"]]
        layers = self.frame[self.frame.metric == "layers"].groupby("budget").value.first().sort_index(ascending=False)
        self.budgets: dict[float, int] = {float(budget): int(count) for budget, count in layers.items()}
        self.below = {budget: count for budget, count in self.budgets.items() if count < self.layers}

    @property
    def backbone(self) -> str:
        """The full name of the backbone."""
        return title_of(self.record["recipe"]["backbone.name"])

    @cached_property
    def runs(self) -> pd.DataFrame:
        """Metrics over all documents, one row for each (router, seed, text, budget)."""
        whole = self.frame[self.frame.document.isna() & self.frame.text.isin(self.texts)]
        return self._in_order(_wide(whole[whole.metric != "score"], ["router", "seed", "text", "budget"]))

    @cached_property
    def fits(self) -> pd.DataFrame:
        """Cost of each run: seconds, parameters and, of healed runs, adapter_lr, by (router, seed)."""
        return self._in_order(_wide(self.frame[self.frame.text.isna()], ["router", "seed"]))

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Means over seeds, one row for each (text, router, budget).

        Columns: layers, K; executed_mean, what tokens ran; perplexity with its standard deviation perplexity_std over
        seeds; seeds; kl; loss (nats per token) with its interval loss_low, loss_high over documents and seeds;
        best_static, whether it is the static router of least loss; difference to that router with difference_low,
        difference_high and significant, whether the interval excludes 0, over enough documents; those of `times` where
        times were measured.
        """
        rows = [row for text in self.texts for budget in self.budgets for row in self._scores_at(text, budget)]
        by_seed = self.runs.groupby(["text", "router", "budget"], sort=False)
        perplexity = by_seed.perplexity.agg(["mean", "std", "count"])
        perplexity.columns = ["perplexity", "perplexity_std", "seeds"]
        means = perplexity.join(by_seed[["layers", "executed_mean", "kl"]].mean())
        found = means.join(pd.DataFrame(rows).set_index(["text", "router", "budget"]))
        return found.join(self.times, on=["router", "budget"])

    @cached_property
    def times(self) -> pd.DataFrame:
        """Milliseconds of a decoded token, decode_ms, which ran decode_layers on average, and of a prompt, prefill_ms;
        millions of multiply-adds per token, multiply_adds. By (router, budget); older records lack the counts.
        """
        speed, names = self.record.get("speed"), ["decode_ms", "decode_layers", "prefill_ms", "multiply_adds"]
        entries = [] if not speed else [(each["router"], each["layers"], each) for each in speed["results"]]
        timed = {label for label, *_ in entries} | {*self.routers.index[self.routers.full_depth.astype(bool)]}
        entries += [] if not speed else [(label, self.layers, speed["full"]) for label in timed]
        rows = [
            {"router": label, "budget": budget} | {name: times.get(name) for name in names}
            for budget, layers in self.budgets.items()
            for label, count, times in entries
            if count == layers
        ]
        return pd.DataFrame(rows, columns=["router", "budget", *names], dtype=object).set_index(["router", "budget"])

    @cached_property
    def tasks(self) -> list[str]:
        """Names of the tasks that runs were scored on."""
        return list(self.frame.text[self.frame.metric == "score"].unique())

    @cached_property
    def shares(self) -> list[str]:
        """Those whose score is a share of right answers, which are known item by item."""
        entries = [entry for run in self.record["runs"] for entry in run["tasks"]]
        unknown = {entry["task"] for entry in entries if entry.get("correct") is None}
        return [task for task in self.tasks if task not in unknown]

    @cached_property
    def task_scores(self) -> pd.DataFrame:
        """Scores on tasks, means over seeds, one row for each (router, budget).

        Columns: each task; mean over the tasks of `shares`; flips against full depth (the mean over tasks and seeds,
        2407.09141); best_static, difference with difference_low and difference_high, and significant, as in `scores`;
        the same of flips, as flips_best_static and so on. Shares, not percent; a task that is none of `shares` has its
        own unit. What needs answers item by item is missing where these are not known.
        """
        scores = self.frame[self.frame.metric == "score"]
        means = scores.groupby(["router", "budget", "text"]).value.agg(mean).unstack("text").reindex(columns=self.tasks)
        means["mean"] = means[self.shares].apply(mean, axis=1) if self.shares else math.nan
        rows = [row for budget in self.budgets for row in self._tasks_at(budget, means)]
        return means.join(pd.DataFrame(rows).set_index(["router", "budget"]))

    def csv(self) -> str:
        """comparison.csv: one line for each run, text and budget; times are empty where they were not measured."""
        wide = self.runs.join(self.fits, on=["router", "seed"]).join(self.times, on=["router", "budget"]).reset_index()
        wide["kind"] = wide.router.map(self.routers.kind)
        speed = self.record.get("speed") or {"tokens": 0}
        wide["decode_tokens_per_second"] = 1e3 / wide.decode_ms
        wide["prefill_tokens_per_second"] = 1e3 * speed["tokens"] / wide.prefill_ms
        wide = wide.rename(columns={"text": "domain", "seconds": "fit_seconds"})
        return wide.reindex(columns=[*CSV_COLUMNS]).astype(dict.fromkeys(WHOLE, int)).to_csv(index=False)

    def _scores_at(self, text: str, budget: float) -> Iterator[dict[str, Any]]:
        """Loss, its interval and the difference to the best static router, for each router on a text at a budget."""
        losses = self._by_document["loss", text, budget]
        tokens = next(iter(self._by_document["tokens", text, budget].values()))[0]  # the same for all routers
        means = {router: mean_loss(loss, tokens) for router, loss in losses.items()}
        compared = self._to_best_static(budget, means, losses, partial(difference, tokens=tokens))
        for router, loss in losses.items():
            low, high = loss_interval(loss, tokens)
            row = {"text": text, "router": router, "budget": budget, "loss": means[router]}
            yield row | {"loss_low": low, "loss_high": high} | compared[router]

    def _tasks_at(self, budget: float, means: pd.DataFrame) -> Iterator[dict[str, Any]]:
        """Differences and flips for each router at a budget."""
        answers = {router: found for router in self.routers.index if (found := self._answers(router, budget))}
        full = {router: self._answers(router, self._full) for router in answers if budget in self.below}
        pairs = {router: zip(tasks, answers[router], strict=True) for router, tasks in full.items() if tasks}
        changes = {router: [flips(*pair) for pair in tasks] for router, tasks in pairs.items()}
        shares = {router: _mean_share(tasks) for router, tasks in changes.items()}
        wrong = {router: -means["mean"].get((router, budget), math.nan) for router in self.routers.index}
        compared = self._to_best_static(budget, wrong, answers, accuracy_difference)
        by_flips = self._to_best_static(budget, shares, changes, accuracy_difference)
        for router in self.routers.index:
            row = {"router": router, "budget": budget, "flips": shares.get(router)} | compared[router]
            yield row | {f"flips_{name}": value for name, value in by_flips[router].items()}

    def _to_best_static(
        self, budget: float, losses: Mapping[str, float], values: Mapping[str, Any], test: PairedTest
    ) -> dict[str, dict[str, Any]]:
        """For each router whether it is the static one of least finite loss, and its difference to that one's.

        A difference is significant where its interval excludes 0, over at least `FEWEST` documents or items.
        """
        static = self.routers.index[(self.routers.kind == "static") & ~self.routers.full_depth.astype(bool)]
        finite = {router: losses[router] for router in static if math.isfinite(losses.get(router, math.nan))}
        best = min(finite, key=finite.__getitem__) if finite and budget in self.below else None
        none = {"difference": math.nan, "significant": False}
        found: dict[str, dict[str, Any]] = {r: {"best_static": r == best, **none} for r in self.routers.index}
        for router in values if best in values else ():
            if router != best:
                value, (low, high) = test(values[router], values[best])
                units = min(array.shape[-1] for array in values[router])  # of each seed, or of each task
                if units == 1:
                    low = high = math.nan
                row = {"difference": value, "difference_low": low, "difference_high": high}
                found[router] |= row | {"significant": units >= FEWEST and (low > 0 or high < 0)}
        return found

    @property
    def _full(self) -> float | None:
        """The budget of full depth."""
        return next((budget for budget, count in self.budgets.items() if count == self.layers), None)

    @cached_property
    def _by_document(self) -> dict[tuple[str, str, float], dict[str, np.ndarray]]:
        """(seeds, documents) values by metric, text and budget, and then by router."""
        documents = self.frame[self.frame.document.notna()]
        found: dict[tuple[str, str, float], dict[str, np.ndarray]] = {}
        for (*key, router), group in documents.groupby(["metric", "text", "budget", "router"], sort=False):
            values = group.pivot(index="seed", columns="document", values="value").to_numpy()
            found.setdefault(tuple(key), {})[router] = values
        return found

    def _answers(self, router: str, budget: float | None) -> list[np.ndarray]:
        """For each task of `shares` (seeds, items) of 0 and 1; empty where they are not all known."""
        tasks = [self._by_document.get(("correct", task, budget), {}).get(router) for task in self.shares]
        seeds = len(self.fits.loc[router])
        return tasks if all(task is not None and len(task) == seeds for task in tasks) else []

    def _in_order(self, wide: pd.DataFrame) -> pd.DataFrame:
        """Rows in the order of routers, seeds, texts and budgets."""
        order = {"router": list(self.routers.index), "text": self.texts, "budget": list(self.budgets)}
        places = {name: {value: place for place, value in enumerate(values)} for name, values in order.items()}
        return wide.sort_index(key=lambda index: index.map(places[index.name]) if index.name in places else index)


def _rows(record: Mapping[str, Any]) -> Iterator[tuple]:
    """The rows of `frame`."""
    for run in record["runs"]:
        owner = run["router"], run["seed"]
        yield from ((*owner, None, None, None, name, value) for name, value in run["fit"].items())
        for text in (each["label"] for each in record["domains"]):
            found = run["domains"][text]
            for result, sums in zip(found["results"], found["documents"], strict=True):
                key = (*owner, text, float(result["budget"]))
                yield from ((*key, None, name, value) for name, value in _metrics(result))
                for name in ("loss", "kl", "tokens"):
                    yield from ((*key, document, name, value) for document, value in enumerate(sums[name]))
        for entry in run["tasks"]:
            key = (*owner, entry["task"], float(entry["budget"]))
            yield (*key, None, "score", entry["value"])
            yield from ((*key, item, "correct", value) for item, value in enumerate(entry["correct"] or ()))


def _metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of the metrics over all documents."""
    yield from ((name, result[name]) for name in ("layers", "perplexity", "kl", "documents", "tokens"))
    yield from zip(("interval_low", "interval_high"), result["interval"], strict=True)
    yield from ((f"executed_{name}", value) for name, value in result["executed"].items())


def _mean_share(tasks: Sequence[np.ndarray]) -> float:
    """Mean over seeds of the mean over tasks of (seeds, items) of 0 and 1, in exact arithmetic."""
    return mean(mean(mean(items.tolist()) for items in seed) for seed in zip(*tasks, strict=True))


def _wide(long: pd.DataFrame, index: list[str]) -> pd.DataFrame:
    return long.pivot(index=index, columns="metric", values="value")
