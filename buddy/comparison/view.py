"""A comparison as tables and figures ask for it: scores by router, text and budget, and what is made of them."""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from buddy.evaluation.report import FEWEST
from buddy.scoring.perplexity import Scores, scores_of
from buddy.scoring.statistics import accuracy_difference, difference, flipped, loss_interval, mean_loss


@dataclass(frozen=True)
class Difference:
    """What a router has minus what the best static one has, with its 95 % interval over `units` documents or items."""

    mean: float
    low: float
    high: float
    units: int

    @property
    def apart(self) -> bool:
        """Whether the interval leaves out 0, over enough units for that to say something."""
        return self.units >= FEWEST and (self.low > 0 or self.high < 0)


def _paired(ours: list[list[list[int]]], theirs: list[list[list[int]]]) -> Difference | None:
    """Of shares of items by seed and task; None where either is not known."""
    if not ours or not theirs:
        return None
    mean, (low, high) = accuracy_difference(ours, theirs)
    return Difference(mean, low, high, min(len(task) for task in ours[0]))


class Comparison:
    """Reads a record (`buddy.comparison.record`).

    Attributes:
        record: all of it.
        labels: routers with at least one finished run, in the order of the rows.
        domains: labels of the texts.
        budgets: K by budget, deepest first.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self._runs: dict[str, list[Mapping[str, Any]]] = {}
        for run in record["runs"]:
            self._runs.setdefault(run["router"], []).append(run)
        self.routers = {each["label"]: each for each in record["routers"] if each["label"] in self._runs}
        self.labels = list(self.routers)
        self.domains = [each["label"] for each in record["domains"]]
        self._scores = {
            (label, domain): [{s.budget: s for s in scores_of(run["domains"][domain])} for run in self._runs[label]]
            for label in self.labels
            for domain in self.domains
        }
        found: dict[Any, int] = {
            s.budget: s.layers for groups in self._scores.values() for group in groups for s in group.values()
        }
        self.budgets: dict[float, int] = dict(sorted(found.items(), reverse=True))

    @cached_property
    def layers(self) -> int:
        """L of the backbone."""
        return self.record["layers"]

    @cached_property
    def below(self) -> dict[float, int]:
        """K by budget, without full depth, where all routers are the dense model."""
        return {budget: count for budget, count in self.budgets.items() if count < self.layers}

    def runs(self, label: str) -> Sequence[Mapping[str, Any]]:
        """The finished runs of a router, one a seed."""
        return self._runs[label]

    def scores(self, label: str, domain: str, budget: float) -> list[Scores]:
        """One entry a seed; empty where the router does not answer this budget."""
        return [group[budget] for group in self._scores[label, domain] if budget in group]

    def perplexities(self, label: str, domain: str, budget: float) -> list[float]:
        """One a seed."""
        return [each.perplexity for each in self.scores(label, domain, budget)]

    def kl(self, label: str, domain: str, budget: float) -> float | None:
        """Mean KL to the dense model over tokens and seeds, nats a token."""
        found = self.scores(label, domain, budget)
        return plain.mean(each.mean_kl for each in found) if found else None

    @cache  # noqa: B019  there are few, and they live as long as the process
    def loss(self, label: str, domain: str, budget: float) -> tuple[float, float, float] | None:
        """Mean cross-entropy over tokens and seeds, nats a token, and its interval."""
        found = self.scores(label, domain, budget)
        return (mean_loss(found), *loss_interval(found)) if found else None

    def best_static(self, domain: str, budget: float) -> str | None:
        """The static router of least mean cross-entropy here."""
        found = {label: self.scores(label, domain, budget) for label in self._statics()}
        losses = {label: mean_loss(scores) for label, scores in found.items() if scores}
        finite = {label: loss for label, loss in losses.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__) if finite else None

    @cache  # noqa: B019
    def difference(self, label: str, domain: str, budget: float) -> Difference | None:
        """To the best static router; None for itself, at full depth, and where there is nothing to compare."""
        best, ours = self.best_static(domain, budget), self.scores(label, domain, budget)
        if best is None or best == label or not ours or budget not in self.below:
            return None
        mean, (low, high) = difference(ours, self.scores(best, domain, budget))
        return Difference(mean, low, high, len(ours[0].tokens))

    def executed(self, label: str) -> list[tuple[int, int, float, int]]:
        """(K, least, mean, most) layers that tokens ran over all texts and seeds, where that was not K for all."""
        found = []
        for budget, count in self.budgets.items():
            ran = [each.executed for domain in self.domains for each in self.scores(label, domain, budget)]
            if any(set(each) != {count} for each in ran):
                least, mean, most = zip(*ran, strict=True)
                found.append((count, min(least), plain.mean(mean), max(most)))
        return found

    def fit(self, label: str, name: str) -> float:
        """Mean over seeds of "seconds" or "parameters"."""
        return plain.mean(run["fit"][name] for run in self._runs[label])

    def rates(self, label: str) -> list[float]:
        """The learning rate of each seed's adapter, where the recipe has several to choose from."""
        found = (run["fit"].get("adapter_lr") for run in self._runs[label])
        return [rate for rate in found if rate is not None]

    def speed(self, label: str, layers: int) -> Mapping[str, Any] | None:
        """Milliseconds of a router at K, where they were measured."""
        measured = self.record["speed"]
        if not measured:
            return None
        if layers == self.layers:
            return measured["full"]
        return next((e for e in measured["results"] if (e["router"], e["layers"]) == (label, layers)), None)

    @cached_property
    def task_names(self) -> list[str]:
        """Tasks that runs were scored on."""
        return list(dict.fromkeys(entry["task"] for run in self.record["runs"] for entry in run["tasks"]))

    def task_values(self, label: str, task: str, budget: float) -> list[float]:
        """One a seed."""
        return [entry["value"] for entry in self._entries(label, task, budget)]

    def task_mean(self, label: str, budget: float) -> float | None:
        """Mean over seeds and tasks; None where a task is missing."""
        values = [self.task_values(label, task, budget) for task in self.task_names]
        return plain.mean(map(plain.mean, values)) if values and all(values) else None

    def best_static_at_tasks(self, budget: float) -> str | None:
        """The static router with the highest mean over tasks."""
        means = {label: self.task_mean(label, budget) for label in self._statics()}
        means = {label: mean for label, mean in means.items() if mean is not None}
        return max(means, key=means.__getitem__) if means else None

    @cache  # noqa: B019
    def task_difference(self, label: str, budget: float) -> Difference | None:
        """Of the mean accuracy over tasks, to the best static router; None where answers are not known one by one."""
        best = self.best_static_at_tasks(budget)
        if best in (None, label) or budget not in self.below:
            return None
        return _paired(*(self._answers(each, budget) for each in (label, best)))

    def flips(self, label: str, budget: float) -> float | None:
        """Share of answers that are right at full depth and wrong here, or the reverse: the mean over tasks and seeds.

        The flips of 2407.09141. None where answers are not known one by one, here and at full depth.
        """
        found = self._flipped(label, budget)
        return plain.mean(plain.mean(map(plain.mean, seed)) for seed in found) if found else None

    def fewest_flips(self, budget: float) -> str | None:
        """The static router with the fewest flips."""
        shares = {label: self.flips(label, budget) for label in self._statics()}
        known = {label: share for label, share in shares.items() if share is not None}
        return min(known, key=known.__getitem__) if known else None

    @cache  # noqa: B019
    def flips_difference(self, label: str, budget: float) -> Difference | None:
        """Of the share of flips, to the static router of fewest; None for itself and where answers are not known."""
        best = self.fewest_flips(budget)
        if best in (None, label):
            return None
        return _paired(*(self._flipped(each, budget) for each in (label, best)))

    def _flipped(self, label: str, budget: float) -> list[list[list[int]]]:
        """For each seed and task 0 or 1 for each item, 1 where full depth is right and this is not, or the reverse."""
        full = next((each for each, count in self.budgets.items() if count == self.layers), None)
        if full is None or budget not in self.below:
            return []
        here, there = self._answers(label, budget), self._answers(label, full)
        if not here or not there:
            return []
        return [[flipped(*task) for task in zip(*seed, strict=True)] for seed in zip(there, here, strict=True)]

    def _answers(self, label: str, budget: float) -> list[list[list[int]]]:
        """For each seed and task 0 or 1 for each item; empty where they are not all known."""
        tasks = [[entry["correct"] for entry in self._entries(label, task, budget)] for task in self.task_names]
        known = all(len(seeds) == len(self._runs[label]) and all(seeds) for seeds in tasks)
        return [list(seed) for seed in zip(*tasks, strict=True)] if known else []

    def _entries(self, label: str, task: str, budget: float) -> list[Mapping[str, Any]]:
        entries = (entry for run in self._runs[label] for entry in run["tasks"])
        return [entry for entry in entries if (entry["task"], entry["budget"]) == (task, budget)]

    def _statics(self) -> list[str]:
        """Static routers that can leave layers out."""
        routers = self.routers.items()
        return [label for label, each in routers if each["kind"] == "static" and not each["full_depth"]]
