"""One run after another: made or found, measured on every text, scored on every task; what is finished stays."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from buddy.backbone.adapter import WEIGHTS
from buddy.build import restore
from buddy.comparison.asked import Tasks
from buddy.comparison.domains import Domain, read_domain
from buddy.comparison.planned import Planned, again, is_finished
from buddy.config import Recipe
from buddy.console import tracker
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM
from buddy.errors import BuddyError, DamagedError, TrainingError
from buddy.fit import Session, prepare
from buddy.io import checksum, read_json, within_memory, write_text, write_with_checksum
from buddy.router import available_budgets
from buddy.run import ADAPTER, METRICS, ROUTER
from buddy.scoring.perplexity import Reference, evaluate, with_documents

EVALUATIONS, TASKS = "evaluations", "tasks"  # in a run folder
Texts = dict[Domain, Windows]


@dataclass(frozen=True)
class Start:
    """All that a process needs to work: nothing in it is large, so that it can be sent to another one.

    Attributes:
        recipe: of any of the runs.
        recipe_name: is kept in the runs.
        domains: what they are measured on.
        tasks: what they are scored on.
        threads: of torch.
    """

    recipe: Recipe
    recipe_name: str
    domains: tuple[Domain, ...]
    tasks: Tasks
    threads: int

    def worker(self) -> Worker:
        """A worker of its own backbone and text."""
        import torch

        torch.set_num_threads(self.threads)
        session = Session(*prepare([self.recipe]))
        texts = {domain: read_domain(domain, self.recipe, session.data) for domain in self.domains}
        return Worker(session, self.recipe_name, texts, self.tasks)


class Worker:
    """Does the work of runs in one process.

    Args:
        session: backbone and text.
        recipe_name: is kept in the runs.
        texts: what runs are measured on.
        tasks: what they are scored on.
    """

    def __init__(self, session: Session, recipe_name: str, texts: Texts, tasks: Tasks) -> None:
        self.session, self._recipe_name, self._texts, self._tasks = session, recipe_name, texts, tasks
        self._references = {domain: Reference() for domain in texts}
        self._full: dict[str, dict[str, Any]] = {}  # a task's entry at full depth

    def run(self, run: Planned) -> str | None:
        """Do what is missing of a run; None, or why it failed, in one sentence.

        Any failure but an interrupt is caught: a router may be anybody's code, and the others are not to suffer.
        """
        report = run.folder.with_name(f"{run.folder.name}.error.txt")
        report.unlink(missing_ok=True)
        try:
            self._do(run)
            return None
        except DamagedError as error:
            return str(again(error, run.folder))
        except TrainingError as error:
            return f"{error} Give another --out with it: a comparison takes no checkpoint for a run of other keys."
        except BuddyError as error:
            return str(error)
        except Exception as error:
            report.parent.mkdir(parents=True, exist_ok=True)
            write_text(report, traceback.format_exc())
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            return f"{type(error).__name__}: {reason or 'no reason was given'}; all of it is in {report}."

    def _do(self, run: Planned) -> None:
        if not is_finished(run):
            self.session.run(run.recipe, self._recipe_name, run.place, run.lent)
        for name in (EVALUATIONS, TASKS) if self._tasks.names else (EVALUATIONS,):
            (run.folder / name).mkdir(exist_ok=True)
        missing = [domain for domain in self._texts if not domain.own and not self._is_measured(run, domain)]
        if missing:
            with self.session.routed(run.recipe) as routed:
                restore(routed, run.recipe, run.folder)
                for domain in missing:
                    self._measure(run, domain, routed)
        for name in self._tasks.names:
            self._score(run, name)

    def _measure(self, run: Planned, domain: Domain, routed: RoutedLM) -> None:
        data = run.recipe.data
        sizes = f"a batch of {data.batch_size} × {data.window} tokens"
        with within_memory(sizes, "free some, or compare anew with data.batch_size smaller and another --out"):
            scores = evaluate(
                routed,
                self._texts[domain],
                available_budgets(routed.router, run.recipe.budgets),
                prompt=data.prompt,
                batch_size=data.batch_size,
                track=tracker(f"Evaluating {run.label} on {domain.label}"),
                reference=self._references[domain],
            )
        write_with_checksum(evaluation_file(run, domain), self._asked(run, domain) | with_documents(scores))

    def _is_measured(self, run: Planned, domain: Domain) -> bool:
        return _is_kept(evaluation_file(run, domain), self._asked(run, domain))

    def _asked(self, run: Planned, domain: Domain) -> dict[str, Any]:
        """What an evaluation is of: where this is the same, the result is."""
        return {"windows": self._texts[domain].fingerprint, **_made(run)}

    def _score(self, run: Planned, name: str) -> None:
        tasks = self._tasks
        places = {name: place and str(place) for name, place in (("data", tasks.data), ("path", tasks.path))}
        asked = {"limit": tasks.limit, **_made(run), **places, **_content(name, tasks)}
        if _is_kept(task_file(run, name), asked):
            return
        write_with_checksum(
            task_file(run, name), asked | {"results": self._entries(run, name, healed="adapter" in asked)}
        )

    def _entries(self, run: Planned, name: str, healed: bool) -> list[dict[str, Any]]:
        """One for each budget; at full depth that of a run before: without healing all are the stock model there."""
        from buddy.evaluation.tasks import task_scores

        tasks, depth = self._tasks, self.session.backbone.num_layers
        known = None if healed else self._full.get(name)
        with self.session.routed(run.recipe) as routed:
            layers = {
                budget: routed.executed_layers(budget)
                for budget in available_budgets(routed.router, run.recipe.budgets)
            }
        todo = [budget for budget, count in layers.items() if known is None or count < depth]
        found = task_scores(run.folder, [name], todo, tasks.limit, tasks.data, tasks.path)["results"] if todo else []
        entries = {entry["budget"]: entry for entry in found}
        full = [entry for entry in found if entry["layers"] == depth]
        if full and not healed:
            self._full[name] = full[0]
        return [entries.get(budget) or {**(known or {}), "budget": budget} for budget in layers]


def _made(run: Planned) -> dict[str, str]:
    """Digests of what was fitted: the router, and the adapter where the run was healed."""
    weights = run.folder / ADAPTER / WEIGHTS
    return {"router": checksum(run.folder / ROUTER)} | ({"adapter": checksum(weights)} if weights.exists() else {})


def _content(name: str, tasks: Tasks) -> dict[str, Any]:
    """What tells whether the questions of a task are still the same."""
    lines = tasks.data / f"{name}.jsonl" if tasks.data else None
    own = sorted(path for path in tasks.path.rglob("*") if path.is_file()) if tasks.path else []
    return {
        "lm_eval": version("lm_eval"),
        "lines": checksum(lines) if lines and lines.is_file() else None,
        "definitions": [checksum(path) for path in own],
    }


def evaluation_file(run: Planned, domain: Domain) -> Path:
    """Where a run's results on a text are: on the recipe's own in its metrics, on others beside them."""
    return run.folder / METRICS if domain.own else run.folder / EVALUATIONS / f"{domain.label}.json"


def task_file(run: Planned, name: str) -> Path:
    """Where a run's results on a task are."""
    return run.folder / TASKS / f"{name.replace('/', '-')}.json"


def _is_kept(path: Path, asked: dict[str, Any]) -> bool:
    try:
        kept = read_json(path)
    except BuddyError:  # missing, or cut
        return False
    return all(kept.get(key) == value for key, value in asked.items())
