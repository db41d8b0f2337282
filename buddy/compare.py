"""`buddy compare`: any routers under one recipe, with several seeds, on several texts."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from buddy.backbone.adapter import WEIGHTS
from buddy.backbone.load import Backbone
from buddy.build import build_windows, heals, restore
from buddy.config import PredictorSection, Recipe, Rival, with_router
from buddy.console import Bar, errors, status
from buddy.data.module import TextData
from buddy.data.text import named_sources, same_source
from buddy.data.windows import Windows
from buddy.engine.model import RoutedLM, geometry_of
from buddy.errors import BuddyError, DamagedError, DataError, RecipeError, RegistryError, RunError, TrainingError
from buddy.evaluation import report
from buddy.evaluation.bench import measured
from buddy.evaluation.record import (
    EVALUATIONS,
    TASKS,
    collect,
    evaluation_file,
    shown_command,
    task_file,
    text_entry,
)
from buddy.executors import LokyExecutor, RayExecutor
from buddy.fit import Session, prepare
from buddy.io import check_output_path, checksum, read_json, within_memory, write_text, write_with_checksum, writing
from buddy.registry import build, describe
from buddy.router import AnyRouter, available_budgets
from buddy.run import (
    ADAPTER,
    FACTS,
    METRICS,
    ROUTER,
    RunFolder,
    check_backbone,
    complete_seeds,
    folder_name,
    input_digests,
    read_metrics,
    read_run,
)
from buddy.scoring.perplexity import Reference, scores_of, with_documents
from buddy.training.module import evaluate

ALL = "all"
BACKENDS = ("loky", "ray")
OPENING, CLOSING = "[{(", "]})"
KINDS = ("learned", "static", "random")  # the order of `all`


def folder_of(label: str) -> str:
    """A label as a folder's name; where characters had to go, a digest of it keeps two labels apart."""
    spelt = label.replace("[", "_", 1).replace(";", ",").removesuffix("]")
    plain = re.sub(r"[^\w.=,-]+", "-", spelt).strip(".")
    return plain if plain == spelt else f"{plain}-{hashlib.sha256(label.encode()).hexdigest()[:6]}"


def contestants(text: str | None, recipe: Recipe) -> list[Rival]:
    """Those in "a,b[key=value;key=value],all"; without a text the recipe's router and its rivals.

    A key with a dot is a recipe's, as in first[optimizer.lr=3e-3]; one without is an option of the router. A name alone
    has the overrides of the recipe's rival of that name. `all` stands for every installed router that can be used and
    is not named beside it.

    Raises:
        RegistryError: nothing is named, one is named twice, or brackets or options cannot be read.
    """
    if text is None:
        return list(dict.fromkeys([Rival(recipe.router.name), *recipe.rivals]))
    rivals = {rival.name: rival for rival in reversed(recipe.rivals) if rival.name != recipe.router.name}
    named = split_outside(text, ",")
    found = [_parse(part, rivals) for part in named if part != ALL]
    labels = [each.label for each in found]
    for label in labels:
        if labels.count(label) > 1:
            raise RegistryError(f"--routers names {label} twice; name it once.")
    if ALL in named:
        others = [rivals.get(name, Rival(name)) for name in _installed(recipe)]
        found += [each for each in others if each.label not in labels]
    if not found:
        raise RegistryError("--routers is empty; name at least one, such as --routers buddy,shortgpt, or all.")
    return found


def split_outside(text: str, sign: str) -> list[str]:
    """The parts between signs that stand in no brackets, without the blanks around them; empty ones are left out.

    Raises:
        RegistryError: a bracket is not closed, or not opened.
    """
    parts, depth = [""], []
    for letter in text:
        if letter in OPENING:
            depth.append(CLOSING[OPENING.index(letter)])
        elif letter in CLOSING and (not depth or depth.pop() != letter):
            depth = [""]
            break
        if letter == sign and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth:
        raise RegistryError(
            f"The brackets in {text!r} do not match; write name[key=value;key=value], as in random[per=input]."
        )
    return [part.strip() for part in parts if part.strip()]


def _parse(text: str, rivals: Mapping[str, Rival]) -> Rival:
    match = re.fullmatch(r"(?P<name>[^\[\]]+?)\s*(\[(?P<options>.*)\])?", text, re.DOTALL)
    if not match:
        raise RegistryError(f"{text!r} is no router; write a name, or name[key=value;key=value].")
    options = split_outside(match["options"] or "", ";")
    if not options:
        return rivals.get(match["name"], Rival(match["name"]))
    return Rival(match["name"], tuple(_option(option, text) for option in options))


def _option(option: str, text: str) -> str:
    key, equals, value = (part.strip() for part in option.partition("="))
    if not equals or not value or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise RegistryError(f"{option!r} in {text} is no option; write key=value, as in random[per=input].")
    return f"{key}={value}" if "." in key else f"router.options.{key}={value}"


def _installed(recipe: Recipe) -> list[str]:
    """Usable names: the recipe's own first, then by kind."""
    kinds = {each.name: each.kind for each in describe() if not each.problem}
    return sorted(kinds, key=lambda name: (name != recipe.router.name, (*KINDS, kinds[name]).index(kinds[name]), name))


@dataclass(frozen=True)
class Domain:
    """A text by its label; `own` is the recipe's, of which the test windows are taken."""

    label: str
    source: str
    own: bool = False


def domains_of(text: str | None, recipe: Recipe) -> list[Domain]:
    """The recipe's own text and those in "SOURCE,label=SOURCE,…"; its own may be named too, to give it a label.

    Raises:
        DataError: nothing is named, two have one label, or a label cannot be a file's name.
    """
    source = recipe.data.source
    (own,) = named_sources(None, source)
    others = {} if text is None else named_sources(text, source)
    for label in [label for label, other in others.items() if same_source(other, source)]:
        own = label
        del others[label]
    if own in others:
        raise DataError(
            f"Two domains are called {own!r}, one of them the recipe's own text; give the other a name, as in "
            f"--domains other={others[own]}."
        )
    found = [Domain(own, source, own=True), *(Domain(label, other) for label, other in others.items())]
    for each in found:
        for key in ("train_sources", "calibration_sources"):
            if any(same_source(each.source, seen) for seen in getattr(recipe.data, key)):
                raise DataError(
                    f"The domain {each.label} is learned from (data.{key}) and would tell nothing; leave it out of "
                    "--domains or of the recipe."
                )
        if not re.fullmatch(r"[\w.-]+", each.label):
            raise DataError(
                f"The domain {each.label!r} would be a file's name; give it one of letters, digits, dots and hyphens, "
                f"as in --domains other={each.source}."
            )
    return found


def read_domain(domain: Domain, recipe: Recipe, data: TextData) -> Windows:
    """The windows of a text: `data.test_windows` of `data.window` tokens, drawn with the data's seed.

    Raises:
        DataError: the text cannot be read, or another text than the recipe's is too short.
    """
    if domain.own:
        return data.test
    section = recipe.data
    windows = build_windows(recipe, data.tokenizer, domain.source, count=section.test_windows)
    if len(windows) < section.test_windows:
        raise DataError(
            f"The text in {domain.source} gives {len(windows)} windows of {section.window} tokens, and "
            f"data.test_windows asks for {section.test_windows}; give more text, or set data.test_windows="
            f"{len(windows)}."
        )
    return windows


SEEDS = 3


@dataclass(frozen=True)
class Tasks:
    """lm-eval's tasks that every run is scored on; see `buddy.evaluation.tasks`."""

    names: tuple[str, ...] = ()
    limit: int | None = None
    data: Path | None = None
    path: Path | None = None


@dataclass(frozen=True)
class Asked:
    """What a person asked to compare.

    Attributes:
        recipe: of all runs.
        source: the recipe's name or file.
        recipe_name: is kept in the runs.
        overrides: laid over the recipe already; shown in the results.
        routers: "a,b[key=value],…"; the recipe's router and its rivals where it is None.
        seeds: for each router that depends on one; None for `SEEDS`, or for all that are finished.
        domains: "SOURCE,label=SOURCE,…" beside the recipe's own text.
        tasks: what runs are scored on.
        jobs: processes at once.
        backend: "loky" for processes of this machine, or "ray" for tasks of a cluster.
        out: the folder for everything.
        speed: whether times are measured.
        finished: fit nothing, and compare what is finished.
        trained: a comparison whose finished runs lend their routers, so that only healing is left to do.
        markdown: where the results are written once more.
    """

    recipe: Recipe
    source: str
    recipe_name: str
    overrides: Sequence[str] = ()
    routers: str | None = None
    seeds: int | None = None
    domains: str | None = None
    tasks: Tasks = field(default_factory=Tasks)
    jobs: int = 1
    backend: str = "loky"
    out: Path | None = None
    speed: bool = True
    finished: bool = False
    trained: Path | None = None
    markdown: Path | None = None

    @property
    def folder(self) -> Path:
        """Where everything goes: `<output>/<recipe>-compare` unless it is said otherwise."""
        return self.out or Path(self.recipe.output) / f"{folder_name(self.recipe_name)}-compare"

    @property
    def command(self) -> str:
        """The command, as far as it decides the results."""
        tasks = {"tasks": ",".join(self.tasks.names), "task-limit": self.tasks.limit}
        places = {"task-data": self.tasks.data, "task-path": self.tasks.path, "trained": self.trained}
        options = {
            "routers": self.routers,
            "seeds": self.seeds or (None if self.finished else SEEDS),
            "domains": self.domains,
            **tasks,
            **places,
        }
        words = [word for name, value in options.items() if value for word in (f"--{name}", str(value))]
        words += ["--finished"] if self.finished else []
        overrides = [text for text in self.overrides if not text.startswith("output=")]
        return shown_command(["buddy", "compare", "--recipe", self.source, *words, *overrides])


def check(asked: Asked) -> None:
    """Raises a BuddyError, a sentence, for what can be told without the model."""
    seeds = SEEDS if asked.seeds is None else asked.seeds
    if seeds < 1:
        raise RecipeError(f"--seeds is {seeds}; give 1 or more.")
    if asked.recipe.seed + seeds > 2**32:
        raise RecipeError(f"seed is {asked.recipe.seed}, too large for {seeds} seeds from it on; set it smaller.")
    if asked.backend not in BACKENDS:
        raise RecipeError(f"--backend cannot be {asked.backend!r}; give {' or '.join(BACKENDS)}.")
    if asked.backend == "ray" and asked.jobs != 1:
        raise RecipeError("--jobs counts processes of this machine; leave it out with --backend ray.")
    if asked.jobs < 1:
        raise RecipeError(f"--jobs is {asked.jobs}; give 1 or more.")
    if asked.recipe.trainer["devices"] * asked.recipe.trainer["num_nodes"] > 1:
        raise RecipeError(
            "buddy compare trains each router on one device; set trainer.devices=1, trainer.num_nodes=1 and --jobs "
            "for several at once."
        )
    if asked.trained is not None:
        _check_lender(asked)
    if asked.recipe.ckpt_path:
        raise RecipeError("buddy compare goes on by itself from what it left; leave ckpt_path out.")
    if asked.folder.exists() and not asked.folder.is_dir():
        raise RunError(f"{asked.folder} is a file; name a folder as --out.")
    if (asked.folder / FACTS).exists():
        raise RunError(f"{asked.folder} is a run folder; name another folder as --out.")
    if asked.markdown:
        check_output_path(asked.markdown)
    if asked.tasks.names:
        from buddy.evaluation.tasks import hushed, load_tasks, require_lm_eval

        require_lm_eval()
        with hushed(), status("Reading tasks …"):
            load_tasks(asked.tasks.names, asked.tasks.data, asked.tasks.path)


def _check_lender(asked: Asked) -> None:
    adapter, trained = asked.recipe.adapter, asked.trained
    if adapter is None:
        raise RecipeError("--trained lends routers to be healed; give adapter.steps=… or another key of adapter.")
    if adapter.joint:
        raise RecipeError("adapter.joint=true trains the routers too; leave --trained out, or set it to false.")
    if not os.path.isdir(trained):  # which answers for names that are too long
        raise RunError(f"{trained} is not the folder of a comparison; name the --out of one as --trained.")
    if os.path.realpath(asked.folder) == os.path.realpath(trained):
        raise RunError(f"{trained} holds the unhealed runs, which stay; give another --out for the healed ones.")


TRAINING = ("trainer.", "callbacks", "objective.", "optimizer.", "data.train_sources")  # of no effect without training


@dataclass(frozen=True)
class Planned:
    """One run to be made or reused: a router under the recipe with one seed.

    Attributes:
        trained: whether the recipe's training has a part in it.
        lent: a finished run whose router it takes instead of calibrating and training its own.
    """

    label: str
    recipe: Recipe
    folder: Path
    trained: bool = True
    lent: Path | None = None

    @property
    def seed(self) -> int:
        """The seed of the router: of its first weights, its search and its training."""
        return self.recipe.seed

    @property
    def place(self) -> RunFolder:
        """Where the run is kept."""
        return RunFolder(self.folder)

    @property
    def log(self) -> Path:
        """What a worker process prints on the way."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def words(self) -> str:
        """What it is called in messages."""
        return f"{self.label}, seed {self.seed}"


def base_of(recipe: Recipe) -> Recipe:
    """What the recipes of all runs have in common: the seed of the data is fixed, so that seeds are routers' alone.

    A budget predictor is left out: budgets are the same for all.
    """
    return replace(
        recipe,
        data=replace(recipe.data, seed=recipe.data_seed),
        rivals=[],
        predictor=PredictorSection(),
        ckpt_path=None,
    )


def planned(label: str, recipe: Recipe, folder: Path, seeds: int, trained: bool = True) -> list[Planned]:
    """A run for each of `seeds` seeds from the recipe's on."""
    runs = (replace(recipe, seed=recipe.seed + number) for number in range(seeds))
    return [Planned(label, each, folder / f"seed-{each.seed}", trained) for each in runs]


def is_finished(run: Planned) -> bool:
    """Whether the run is complete in its folder."""
    return run.place.is_complete


def with_lent(run: Planned, lender: Planned, made_of: Mapping[str, str], windows: str) -> Planned:
    """The run with the router of one that was made under the same recipe without an adapter, if that is finished.

    Args:
        lender: in its folder, with the recipe of `run`; `trained` says whether training has a part in its router.
        made_of: digests of model, text and code.
        windows: fingerprint of the recipe's test windows.

    Raises:
        RunError: the lender was made otherwise, or was healed itself.
    """
    if not is_finished(lender):
        return run
    with _mendable(lender):
        healed = read_run(lender.folder).recipe.adapter is not None
    if healed:
        raise RunError(f"{lender.folder} was healed itself; name the comparison that it came from as --trained.")
    reasons = lender.place.differences(
        lender.recipe, made_of, ignore=("adapter", *(() if lender.trained else TRAINING))
    )
    if reasons:
        raise RunError(
            f"{lender.folder} was made otherwise ({'; '.join(reasons)}) and cannot lend its router; leave "
            "--trained out."
        )
    _check_whole(lender, made_of["model"], windows)
    return replace(run, lent=lender.folder)


def check_reuse(runs: Sequence[Planned], made_of: Mapping[str, Mapping[str, str]], windows: str) -> None:
    """Refuse finished and unfinished runs that were not made as these are.

    Args:
        made_of: digests of model, text and code, by router.
        windows: fingerprint of the recipe's test windows.

    Raises:
        RunError: other recipes, with the keys that differ; another backbone; another text.
    """
    found = {run.folder: _differences(run, made_of[run.recipe.router.name]) for run in runs}
    wrong = [folder for folder, reasons in found.items() if reasons]
    if wrong:
        reasons = "; ".join(dict.fromkeys(reason for each in found.values() for reason in each))
        more = f" and {len(wrong) - 1} more were" if len(wrong) > 1 else " was"
        raise RunError(
            f"{wrong[0]}{more} made otherwise ({reasons}) and cannot stand in this comparison; give another --out, or "
            "delete that folder."
        )
    for run in runs:
        run.place.warn_of_changed_code(made_of[run.recipe.router.name])
    for run in filter(is_finished, runs):
        _check_whole(run, made_of[run.recipe.router.name]["model"], windows)


def _differences(run: Planned, made_of: Mapping[str, str]) -> list[str]:
    return run.place.differences(run.recipe, made_of, ignore=() if run.trained else TRAINING)


def again(error: DamagedError, folder: Path) -> RunError:
    """The error for a damaged run of a comparison, which its command alone makes again."""
    return RunError(
        f"{error.path} is damaged ({error.reason}); delete {folder} and repeat the `buddy compare` that made it."
    )


@contextmanager
def _mendable(run: Planned) -> Iterator[None]:
    """Within this block a damaged file of a finished run is told as what it is here."""
    try:
        yield
    except DamagedError as error:
        raise again(error, run.folder) from error


def _check_whole(run: Planned, model: str, windows: str) -> None:
    """Raises RunError where a finished run lacks results, is of another model, or was measured on other windows."""
    with _mendable(run):
        check_backbone(read_run(run.folder), model)
        metrics = read_metrics(run.folder)
        if not _is_complete(metrics):
            raise DamagedError(run.folder / METRICS, "something is missing or wrong in it")
    if metrics.get("windows") != windows:
        raise RunError(
            f"{run.folder} was measured on other test windows, so the text in {run.recipe.data.source} has changed "
            "since; give another --out, or delete that folder."
        )


def _is_complete(metrics: Mapping[str, Any]) -> bool:
    """Whether all that a comparison reads of a run is in its metrics.json."""
    try:
        scores_of(metrics)
        return all(math.isfinite(metrics["fit"][name]) for name in ("seconds", "parameters"))
    except (LookupError, TypeError, ValueError):
        return False


Texts = dict[Domain, Windows]


_kept: tuple[Start, Worker] | None = None  # of this process


@dataclass(frozen=True)
class Start:
    """All that a process needs to work: nothing in it is large, so that it can be sent to another one.

    Attributes:
        recipe: of any of the runs.
        recipe_name: is kept in the runs.
        domains: what they are measured on.
        tasks: what they are scored on.
    """

    recipe: Recipe
    recipe_name: str
    domains: tuple[Domain, ...]
    tasks: Tasks

    def __call__(self, run: Planned) -> str | None:
        """Do what is missing of a run; None, or why it failed. Backbone and text are loaded once in a process."""
        global _kept
        if _kept is None or _kept[0] != self:
            _kept = self, self.worker()
        return _kept[1].run(run)

    def worker(self) -> Worker:
        """A worker of its own backbone and text."""
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
                description=f"Evaluating {run.label} on {domain.label}",
                reference=self._references[domain],
            )
        path = evaluation_file(run.folder, domain.label, domain.own)
        write_with_checksum(path, self._asked(run, domain) | with_documents(scores))

    def _is_measured(self, run: Planned, domain: Domain) -> bool:
        return _is_kept(evaluation_file(run.folder, domain.label, domain.own), self._asked(run, domain))

    def _asked(self, run: Planned, domain: Domain) -> dict[str, Any]:
        """What an evaluation is of: where this is the same, the result is."""
        return {"windows": self._texts[domain].fingerprint, **_made(run)}

    def _score(self, run: Planned, name: str) -> None:
        tasks = self._tasks
        places = {name: place and str(place) for name, place in (("data", tasks.data), ("path", tasks.path))}
        asked = {"limit": tasks.limit, **_made(run), **places, **_content(name, tasks)}
        if _is_kept(task_file(run.folder, name), asked):
            return
        write_with_checksum(
            task_file(run.folder, name), asked | {"results": self._entries(run, name, healed="adapter" in asked)}
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


def _is_kept(path: Path, asked: dict[str, Any]) -> bool:
    try:
        kept = read_json(path)
    except BuddyError:  # missing, or cut
        return False
    return all(kept.get(key) == value for key, value in asked.items())


MadeOf = Mapping[str, Mapping[str, str]]  # digests of model, text and code, by router
FOUND = 0.5  # seconds within which a run that was finished before is passed by


def compare(asked: Asked) -> int:
    """Fit or reuse every run, measure all, and show them side by side.

    Returns:
        How many things failed; they were reported, and the others are done.

    Raises:
        BuddyError: anything that a person can mend, found before any work.
        KeyboardInterrupt: stopped in good order; the same call goes on.
    """
    check(asked)
    base = base_of(asked.recipe)
    if asked.recipe.predictor.name is not None:
        errors.print("A comparison fits no budget predictor: all routers have the recipe's budgets.", soft_wrap=True)
    recipes = {each: with_router(base, each) for each in contestants(asked.routers, asked.recipe)}
    domains = domains_of(asked.domains, asked.recipe)
    backbone, data = prepare(list(recipes.values()))
    with status("Reading text …"):
        texts = {domain: read_domain(domain, base, data) for domain in domains}
    runs = {each.label: _planned(asked, each, recipe, backbone) for each, recipe in recipes.items()}
    made_of = {
        recipe.router.name: input_digests(
            recipe.router.name, backbone.fingerprint, data.fingerprint, data.train_fingerprint or ""
        )
        for recipe in recipes.values()
    }
    windows = data.test.fingerprint
    check_reuse([run for group in runs.values() for run in group], made_of, windows)
    if asked.trained is not None and not asked.finished:
        runs = _with_lent(runs, asked.trained, made_of, windows, backbone)
    if asked.finished:
        runs = _finished(runs, asked.folder)
    with _locked(asked.folder):
        return _compare(asked, base, runs, texts, backbone, data)


def _compare(
    asked: Asked,
    base: Recipe,
    runs: Mapping[str, Sequence[Planned]],
    texts: Texts,
    backbone: Backbone,
    data: TextData,
) -> int:
    failures = _work(asked, runs, texts, Session(backbone, data))
    failed = {run.folder for run, _ in failures}
    done = {label: [run for run in group if run.folder not in failed] for label, group in runs.items()}
    first = {label: group[0] for label, group in done.items() if group}
    speed, problem = _times(asked, first, backbone, data) if first else (None, None)
    if first:
        record = collect(
            {label: [run.folder for run in group] for label, group in done.items()},
            command=asked.command,
            recipe=base,
            layers=backbone.num_layers,
            texts=[text_entry(each.label, each.source, windows, own=each.own) for each, windows in texts.items()],
            tasks=asked.tasks.names,
            task_limit=asked.tasks.limit,
            speed=speed,
            failures=[(run.label, run.seed, reason) for run, reason in failures],
        )
        report.write(record, asked.folder, asked.markdown)
    for run, reason in failures:
        errors.print(f"Failed: {run.words}: {reason}", soft_wrap=True)
    if problem:
        errors.print(f"Failed: times were not measured: {problem}", soft_wrap=True)
    return len(failures) + bool(problem)


def _planned(asked: Asked, each: Rival, recipe: Recipe, backbone: Backbone) -> list[Planned]:
    """The runs of one router.

    It has all the seeds where they matter: not for what is measured alone, nor where an option fixes the draws. The
    recipe's training has a part in the router, or in its adapter, or in neither.
    """
    router, folder = _built_router(recipe, backbone), asked.folder / folder_of(each.label)
    trained = router.trainable or heals(recipe, router)
    seeds = asked.seeds or SEEDS
    if asked.finished and asked.seeds is None:
        seeds = max([seed - recipe.seed + 1 for seed in complete_seeds(folder)] + [1])
    return planned(each.label, recipe, folder, seeds if trained or _draws(recipe, router) else 1, trained)


def _built_router(recipe: Recipe, backbone: Backbone) -> AnyRouter:
    routing, section = recipe.routing, recipe.router
    geometry = geometry_of(backbone, routing.context_layer, routing.pool)  # type: ignore[arg-type]  # checked by the schema
    return build(section.name, geometry, section.options)


def _draws(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether the router itself, healing apart, is another one for another seed."""
    return router.trainable or (router.seeded and recipe.router.options.get("seed") is None)


def _with_lent(
    runs: Mapping[str, Sequence[Planned]], folder: Path, made_of: MadeOf, windows: str, backbone: Backbone
) -> dict[str, list[Planned]]:
    """The runs with the routers that finished ones in a folder lend; those without a lender are said.

    A router that is the same for every seed was fitted once, and is lent to all.

    Raises:
        RunError: none is lent, or one was made otherwise.
    """
    found = {}
    for label, group in runs.items():
        first = group[0]
        router, inputs = _built_router(first.recipe, backbone), made_of[first.recipe.router.name]
        there = folder / first.folder.parent.name
        shared = [] if _draws(first.recipe, router) else complete_seeds(there)
        recipes = [replace(run.recipe, seed=shared[0]) if shared else run.recipe for run in group]
        lenders = [planned(label, recipe, there, 1, router.trainable)[0] for recipe in recipes]
        found[label] = [with_lent(run, lender, inputs, windows) for run, lender in zip(group, lenders, strict=True)]
    everyone = [run for group in found.values() for run in group]
    if not any(run.lent for run in everyone):
        raise RunError(f"{folder} holds a finished run of none of these routers and seeds; leave --trained out.")
    alone = [run.words for run in everyone if run.lent is None and not is_finished(run)]
    if alone:
        errors.print(f"To be fitted here, for want of a finished run: {'; '.join(alone)}.", soft_wrap=True)
    return found


def _finished(runs: Mapping[str, Sequence[Planned]], folder: Path) -> dict[str, list[Planned]]:
    """Those that need no fitting; routers with none are left out, and said."""
    found = {label: [run for run in group if is_finished(run)] for label, group in runs.items()}
    missing = [label for label, group in found.items() if not group]
    if len(missing) == len(found):
        raise RunError(f"No run in {folder} is finished yet; leave --finished out to fit them.")
    if missing:
        errors.print(f"Not finished, and left out: {', '.join(missing)}.", soft_wrap=True)
    return {label: group for label, group in found.items() if group}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RunError(f"Another process compares into {folder}; wait for it, or give another --out.") from None
    try:
        yield
    finally:
        lock.release()


def _work(
    asked: Asked, runs: Mapping[str, Sequence[Planned]], texts: Texts, session: Session
) -> list[tuple[Planned, str]]:
    """Do all runs; those that failed, and why."""
    todo = [run for group in runs.values() for run in group]
    if asked.backend == "loky" and asked.jobs == 1:
        return _one_by_one(Worker(session, asked.recipe_name, texts, asked.tasks), todo)
    failures: list[tuple[Planned, str]] = []
    threads = max(1, torch.get_num_threads() // asked.jobs)
    start = Start(todo[0].recipe, asked.recipe_name, tuple(texts), asked.tasks)
    executor = RayExecutor() if asked.backend == "ray" else LokyExecutor(asked.jobs, threads)
    with Bar("Runs on Ray" if asked.backend == "ray" else f"Runs, {asked.jobs} at once", len(todo)) as bar:
        done = 0

        def on_done(run: Planned, outcome: str | Exception | None) -> None:
            nonlocal done
            done += 1
            failures.extend([(run, str(outcome))] if outcome else [])
            bar.update(done, f"{'failed: ' if outcome else ''}{run.words}")

        executor.run(start, todo, on_done)
    return failures


def _one_by_one(worker: Worker, todo: Sequence[Planned]) -> list[tuple[Planned, str]]:
    """All runs in this process, each announced with the time that is left."""
    failures = []
    spent: list[float] = []
    for number, run in enumerate(todo):
        words = f"Run {number + 1} of {len(todo)}: {run.words}{_left(spent, len(todo) - number)}"
        errors.print(words, soft_wrap=True)
        start = time.monotonic()
        reason = worker.run(run)
        spent.append(time.monotonic() - start)
        failures += [(run, reason)] if reason else []
    return failures


def _left(spent: Sequence[float], runs: int) -> str:
    """How long it took, and will take, judged by the runs that were not found finished."""
    worked = [seconds for seconds in spent if seconds >= FOUND]
    if not worked:
        return ""
    left = runs * sum(worked) / len(worked)
    return f" ({timedelta(seconds=round(sum(spent)))} elapsed, about {timedelta(seconds=round(left))} left)"


def _times(
    asked: Asked, runs: Mapping[str, Planned], backbone: Backbone, data: TextData
) -> tuple[dict[str, Any] | None, str | None]:
    """Times of a run of each router, or why there are none."""
    if not asked.speed:
        return None, None
    try:
        read = {label: read_run(run.folder) for label, run in runs.items()}
        return measured(read, backbone, data.test.input_ids, asked.folder), None
    except BuddyError as error:
        return None, str(error)
    except Exception as error:  # a router may be anybody's code
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
