"""Several routers under one recipe: `buddy fit` with its rivals, and `buddy compare` with seeds, texts and tasks.

Both make the same run folders `<folder>/<router>/seed-N` and the same tables. `buddy fit` has one seed and the recipe's
own text, can run in several processes, and makes a run anew when its recipe has changed; `buddy compare` refuses such a
run.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from buddy import console, distributed
from buddy.build import heals
from buddy.config import with_router
from buddy.console import Bar, errors, status
from buddy.data.text import named_sources, same_source
from buddy.data.windows import Windows
from buddy.engine.model import geometry_of
from buddy.errors import (
    BuddyError,
    DataError,
    RecipeError,
    RunError,
    reason,
)
from buddy.evaluation.bench import measured
from buddy.evaluation.record import collect, text_entry, write_results
from buddy.executors import LokyExecutor, RayExecutor
from buddy.fit import RunSpec, Session
from buddy.io import check_output_path, remove_parts, writing
from buddy.registry import build
from buddy.router import AnyRouter
from buddy.run import RunFolder, complete_seeds, folder_name, label_folder, read_run, warn_of_changed_code
from buddy.run_files import FACTS
from buddy.schema import PredictorSection, Recipe, Rival
from buddy.worker import Tasks, Text, Worker, WorkerConfig, read_windows

SEEDS = 3
PATIENCE = 10.0  # seconds that `fit` waits for another to write its tables
BACKENDS = ("loky", "ray")
# Beginnings of recipe keys that change nothing in a run without training, and in a run of a comparison.
TRAINING_KEYS = ("trainer.", "objective.", "optimizer.", "data.train_sources")
FREE_KEYS = ("predictor.",)
ALREADY_COMPLETE = 0.5  # seconds; a run that takes less was complete before


@dataclass(frozen=True)
class CompareConfig:
    """What `buddy compare` does.

    Attributes:
        recipe: of all runs.
        recipe_name: kept in the runs.
        command: shown in the results.
        routers: rows of the tables; None for the recipe's router and its rivals.
        seeds: of each router that depends on one; None for `SEEDS`, or for all that are complete.
        texts: "SOURCE,label=SOURCE,…" beside the recipe's own.
        tasks: what runs are scored on.
        jobs: runs at once on a machine.
        backend: "loky" for processes of this machine, "ray" for a Ray cluster at RAY_ADDRESS.
        out: the folder for everything; `<output>/<recipe>` by default.
        speed: measure times.
        finished: fit nothing, and compare what is complete.
        trained: the folder of a comparison whose routers are taken, so that only the adapter is trained.
        markdown: where the results are written once more.
    """

    recipe: Recipe
    recipe_name: str
    command: str = ""
    routers: Sequence[Rival] | None = None
    seeds: int | None = None
    texts: str | None = None
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
        """Where everything goes."""
        return self.out or Path(self.recipe.output) / folder_name(self.recipe_name)


# Verbs


def fit(recipe: Recipe, recipe_name: str, command: str = "") -> None:
    """Fit the recipe's router and its rivals with one seed, and show them side by side.

    Rivals come first: they take little time, so that the training, which can resume, is what an interrupt meets. A
    complete run of the same recipe and inputs is reused; one of another recipe is made anew and replaced when the new
    one is complete.

    Args:
        recipe: of the runs.
        recipe_name: names their folder.
        command: shown in the results.

    Raises:
        BuddyError: the user can correct the cause; complete runs stay.
        KeyboardInterrupt: stopped after a step; the same call resumes.
    """
    first = distributed.is_global_zero()
    console.errors.quiet = console.results.quiet = not first
    base, own = common_recipe(recipe), Rival(recipe.router.name)
    own_recipe = replace(base, predictor=recipe.predictor, ckpt_path=recipe.ckpt_path)
    recipes = {each: with_router(base, each) for each in recipe.rivals if each != own} | {own: own_recipe}
    specs = {each.label: _spec(each.label, of, recipe_name) for each, of in recipes.items()}
    session = Session.launch(list(recipes.values()), list(specs.values()))
    with distributed.lost_peers_reported():
        for number, spec in enumerate(specs.values(), start=1):
            complete = distributed.broadcast(first and spec.run_folder.is_complete and not session.differences(spec))
            if len(specs) > 1 or complete:
                note = ", complete: reused" if complete else ""
                errors.print(f"Router {number} of {len(specs)}: {spec.label}{note}", soft_wrap=True)
            if complete and first:
                warn_of_changed_code(spec.folder, session.digests(spec.recipe))
            elif not complete:
                (session.fit if first else session.follow)(spec)
    if first:
        folders = {label: [specs[label].folder] for label in (own.label, *specs)}
        (text,) = texts_of(None, recipe)
        record = collect(
            folders,
            command=command,
            recipe=base,
            layers=session.backbone.num_layers,
            texts=[text_entry(text.label, text.source, session.data.test, own=True)],
        )
        folder = Path(recipe.output) / folder_name(recipe_name)
        with _locked(folder, PATIENCE):
            write_results(record, folder)


def compare(config: CompareConfig) -> int:
    """Fit or reuse every run, evaluate all, and show them side by side.

    Returns:
        The number of failures. They are reported, and all other runs are complete.

    Raises:
        BuddyError: a mistake that was found before any work.
        KeyboardInterrupt: stopped; the same call resumes.
    """
    check(config)
    base = common_recipe(config.recipe)
    if config.recipe.predictor.name is not None:
        errors.print("A comparison fits no budget predictor: all routers have the recipe's budgets.", soft_wrap=True)
    rivals = config.routers or list(dict.fromkeys([Rival(config.recipe.router.name), *config.recipe.rivals]))
    recipes = {each.label: with_router(base, each) for each in rivals}
    texts = texts_of(config.texts, config.recipe)
    session = Session.prepare(list(recipes.values()))
    with status("Reading text …"):
        windows = {text: read_windows(text, base, session.data) for text in texts}
    runs = {label: _specs(config, label, recipe, session) for label, recipe in recipes.items()}
    _refuse_others([spec for group in runs.values() for spec in group], session)
    if config.finished:
        runs = _complete_ones(runs, config.folder)
    elif config.trained is not None:
        runs = _reusing(runs, config.trained, session)
    with _locked(config.folder):
        failures = _work(config, base, runs, session, windows)
        failed = {spec.folder for spec, _ in failures}
        done = {label: [spec for spec in group if spec.folder not in failed] for label, group in runs.items()}
        done = {label: group for label, group in done.items() if group}
        speed, problem = _times(done, session, config.folder) if done and config.speed else (None, None)
        if done:
            record = collect(
                {label: [spec.folder for spec in group] for label, group in done.items()},
                command=config.command,
                recipe=base,
                layers=session.backbone.num_layers,
                texts=[text_entry(text.label, text.source, found, own=text.own) for text, found in windows.items()],
                tasks=config.tasks.names,
                task_limit=config.tasks.limit,
                speed=speed,
                failures=[(spec.label, spec.recipe.seed, why) for spec, why in failures],
            )
            write_results(record, config.folder, config.markdown)
    for spec, why in failures:
        errors.print(f"Failed: {spec.title}: {why}", soft_wrap=True)
    if problem:
        errors.print(f"Failed: times were not measured: {problem}", soft_wrap=True)
    return len(failures) + bool(problem)


def check(config: CompareConfig) -> None:
    """Raises a BuddyError for mistakes that show without the model."""
    seeds = SEEDS if config.seeds is None else config.seeds
    trainer = config.recipe.trainer
    if seeds < 1:
        raise RecipeError(f"--seeds is {seeds}; give 1 or more.")
    if config.recipe.seed + seeds > 2**32:
        raise RecipeError(f"seed is {config.recipe.seed}, too large for {seeds} seeds from it on; set it smaller.")
    if config.jobs < 1:
        raise RecipeError(f"--jobs is {config.jobs}; give 1 or more.")
    if config.backend not in BACKENDS:
        raise RecipeError(f"--backend is {config.backend}; give one of {', '.join(BACKENDS)}.")
    if trainer["devices"] != 1 or trainer["num_nodes"] != 1:
        raise RecipeError(
            "buddy compare trains each router on one device; set trainer.devices=1 and trainer.num_nodes=1, and --jobs "
            "for several at once."
        )
    if config.recipe.ckpt_path:
        raise RecipeError("buddy compare resumes by itself; leave ckpt_path out.")
    if config.trained is not None:
        _check_trained(config)
    if config.folder.exists() and not config.folder.is_dir():
        raise RunError(f"{config.folder} is a file; name a folder as --out.")
    if (config.folder / FACTS).exists():
        raise RunError(f"{config.folder} is a run folder; name another folder as --out.")
    if config.markdown:
        check_output_path(config.markdown)
    if config.tasks.names:
        from buddy.evaluation.task_data import hushed, load_tasks, require_lm_eval

        require_lm_eval()
        with hushed(), status("Reading tasks …"):
            load_tasks(config.tasks.names, config.tasks.data, config.tasks.path)


def _check_trained(config: CompareConfig) -> None:
    adapter, trained = config.recipe.adapter, config.trained
    if adapter is None:
        raise RecipeError("--trained heals trained routers; give adapter.steps=… or another key of adapter.")
    if adapter.joint:
        raise RecipeError("adapter.joint=true trains the routers too; leave --trained out, or set it to false.")
    if not os.path.isdir(trained):  # os.path answers for names that are too long
        raise RunError(f"{trained} is not the folder of a comparison; name the --out of one as --trained.")
    if os.path.realpath(config.folder) == os.path.realpath(trained):
        raise RunError(f"{trained} holds the unhealed runs, which stay; give another --out for the healed ones.")


# Texts


def texts_of(text: str | None, recipe: Recipe) -> list[Text]:
    """The recipe's own text and those in "SOURCE,label=SOURCE,…"; its own may be named too, to give it a label.

    Raises:
        DataError: nothing is named, two have one label, a label cannot be a file name, or a text is trained on.
    """
    source = recipe.data.source
    (own,) = named_sources(None, source)
    others = {} if text is None else named_sources(text, source)
    for label in [label for label, other in others.items() if same_source(other, source)]:
        own = label
        del others[label]
    if own in others:
        raise DataError(
            f"Two texts are called {own!r}, one of them the recipe's own; give the other a name, as in --domains "
            f"other={others[own]}."
        )
    found = [Text(own, source, own=True), *(Text(label, other) for label, other in others.items())]
    for each in found:
        for key in ("train_sources", "calibration_sources"):
            if any(same_source(each.source, seen) for seen in getattr(recipe.data, key)):
                raise DataError(
                    f"The text {each.label} is in data.{key}, so results on it would be worthless; leave it out of "
                    "--domains or of the recipe."
                )
        if not re.fullmatch(r"[\w.-]+", each.label):
            raise DataError(
                f"The label {each.label!r} cannot be a file name; give one of letters, digits, dots and hyphens, as in "
                f"--domains other={each.source}."
            )
    return found


# Runs


def common_recipe(recipe: Recipe) -> Recipe:
    """What the recipes of all runs have in common: the seed of the data is fixed, so that `seed` is the router's alone.

    The budget predictor and the checkpoint belong to the recipe's own router.
    """
    data = replace(recipe.data, seed=recipe.data_seed)
    return replace(recipe, data=data, rivals=[], predictor=PredictorSection(), ckpt_path=None)


def _spec(label: str, recipe: Recipe, recipe_name: str) -> RunSpec:
    return RunSpec(label, recipe, recipe_name, RunFolder.of(recipe, recipe_name, label).path)


def _specs(config: CompareConfig, label: str, recipe: Recipe, session: Session) -> list[RunSpec]:
    """The runs of one router: one for each seed if the router or its adapter depends on it, else one."""
    router, folder = _router(recipe, session), config.folder / label_folder(label)
    trained = router.trainable or heals(recipe, router)
    count = config.seeds or SEEDS
    if config.finished and config.seeds is None:
        count = max([seed - recipe.seed + 1 for seed in complete_seeds(folder)] + [1])
    seeds = range(recipe.seed, recipe.seed + (count if trained or _depends_on_seed(recipe, router) else 1))
    free = FREE_KEYS if trained else (*FREE_KEYS, *TRAINING_KEYS)
    return [
        RunSpec(label, replace(recipe, seed=seed), config.recipe_name, folder / f"seed-{seed}", free_keys=free)
        for seed in seeds
    ]


def _router(recipe: Recipe, session: Session) -> AnyRouter:
    routing, section = recipe.routing, recipe.router
    geometry = geometry_of(session.backbone, routing.context_layer, routing.pool)  # type: ignore[arg-type]  # checked
    return build(section.name, geometry, section.options)


def _depends_on_seed(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether the router, apart from its adapter, differs between seeds."""
    return router.trainable or (router.seeded and recipe.router.options.get("seed") is None)


def _refuse_others(specs: Sequence[RunSpec], session: Session) -> None:
    """Raises RunError if folders hold runs of other recipes or inputs; changed code of a router is a warning."""
    wrong = {spec.folder: found for spec in specs if (found := session.differences(spec))}
    if wrong:
        folder, *others = wrong
        reasons = "; ".join(dict.fromkeys(each for found in wrong.values() for each in found))
        more = f" and {len(others)} more were" if others else " was"
        raise RunError(
            f"{folder}{more} made otherwise ({reasons}) and cannot be in this comparison; give another --out, or "
            "delete that folder."
        )
    for spec in specs:
        warn_of_changed_code(spec.folder, session.digests(spec.recipe))


def _complete_ones(runs: Mapping[str, Sequence[RunSpec]], folder: Path) -> dict[str, list[RunSpec]]:
    """The runs that are complete; routers without one are reported and left out."""
    found = {label: [spec for spec in group if spec.run_folder.is_complete] for label, group in runs.items()}
    missing = [label for label, group in found.items() if not group]
    if len(missing) == len(found):
        raise RunError(f"No run in {folder} is complete yet; leave --finished out to fit them.")
    if missing:
        errors.print(f"Not complete, and left out: {', '.join(missing)}.", soft_wrap=True)
    return {label: group for label, group in found.items() if group}


def _reusing(runs: Mapping[str, Sequence[RunSpec]], folder: Path, session: Session) -> dict[str, list[RunSpec]]:
    """The runs, each with the trained router of its counterpart in another comparison; those without one are reported.

    A router that does not depend on the seed was fitted once, and serves all seeds.

    Raises:
        RunError: there is no counterpart at all, or one was made otherwise.
    """
    found = {label: [_reuse(spec, folder, session) for spec in group] for label, group in runs.items()}
    specs = [spec for group in found.values() for spec in group]
    if not any(spec.reuse_from for spec in specs):
        raise RunError(f"{folder} holds a complete run of none of these routers and seeds; leave --trained out.")
    alone = [spec.title for spec in specs if spec.reuse_from is None and not spec.run_folder.is_complete]
    if alone:
        errors.print(f"Fitted here, because {folder} has no complete run: {'; '.join(alone)}.", soft_wrap=True)
    return found


def _reuse(spec: RunSpec, folder: Path, session: Session) -> RunSpec:
    router, there = _router(spec.recipe, session), folder / spec.folder.parent.name
    seeds = [spec.recipe.seed] if _depends_on_seed(spec.recipe, router) else complete_seeds(there)
    if not seeds or not (other := RunFolder(there / f"seed-{seeds[0]}")).is_complete:
        return spec
    if read_run(other.path).recipe.adapter is not None:
        raise RunError(f"{other.path} was healed itself; name the comparison that it came from as --trained.")
    free = ("adapter", *FREE_KEYS, *(() if router.trainable else TRAINING_KEYS))
    recipe = replace(spec.recipe, seed=seeds[0])
    if reasons := other.differences(recipe, session.digests(recipe), ignore=free):
        raise RunError(
            f"{other.path} was made otherwise ({'; '.join(reasons)}), so its router cannot be healed here; leave "
            "--trained out."
        )
    return replace(spec, reuse_from=other.path)


@contextmanager
def _locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Held while a comparison works in its folder; `patience` in seconds is how long it waits for another one."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise RunError(f"Another process compares into {folder}; wait for it, or give another --out.") from None
        remove_parts(folder, below="")
    try:
        yield
    finally:
        lock.release()


# Work


def _work(
    config: CompareConfig,
    base: Recipe,
    runs: Mapping[str, Sequence[RunSpec]],
    session: Session,
    windows: Mapping[Text, Windows],
) -> list[tuple[RunSpec, str]]:
    """Do all runs; those that failed, and why."""
    specs = [spec for group in runs.values() for spec in group]
    if config.backend == "loky" and config.jobs == 1:
        return _serially(Worker(session, windows, config.tasks).run, specs)
    failures: list[tuple[RunSpec, str]] = []
    threads = max(1, torch.get_num_threads() // config.jobs)
    ray = RayExecutor(threads=threads)
    executor = ray if config.backend == "ray" else LokyExecutor(config.jobs, threads)
    absolute = [replace(spec, folder=spec.folder.resolve()) for spec in specs]
    with Bar(f"Runs, {'on Ray' if config.backend == 'ray' else f'{config.jobs} at once'}", len(specs)) as bar:
        done = 0

        def on_done(spec: RunSpec, outcome: Any) -> None:
            nonlocal done
            done += 1
            if outcome is not None:
                own = next(each for each in specs if each.folder.resolve() == spec.folder)
                failures.append((own, str(outcome)))
            bar.update(done, f"{'failed: ' if outcome else ''}{spec.title}")

        errors.print(f"Each run writes what it does to {config.folder}/<router>/seed-N.log.", soft_wrap=True)
        executor.run(WorkerConfig(base, tuple(windows), config.tasks), absolute, on_done)
    return failures


def _serially(run: Callable[[RunSpec], str | None], specs: Sequence[RunSpec]) -> list[tuple[RunSpec, str]]:
    """All runs in this process, each announced with the time that is left."""
    failures: list[tuple[RunSpec, str]] = []
    spent: list[float] = []
    for number, spec in enumerate(specs):
        worked = [seconds for seconds in spent if seconds >= ALREADY_COMPLETE]
        left = ""
        if worked:
            remaining = (len(specs) - number) * sum(worked) / len(worked)
            left = f" ({_clock(sum(spent))} elapsed, about {_clock(remaining)} left)"
        errors.print(f"Run {number + 1} of {len(specs)}: {spec.title}{left}", soft_wrap=True)
        start = time.monotonic()
        why = run(spec)
        spent.append(time.monotonic() - start)
        failures += [(spec, why)] if why else []
    return failures


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _times(
    runs: Mapping[str, Sequence[RunSpec]], session: Session, folder: Path
) -> tuple[dict[str, Any] | None, str | None]:
    """Times of the first run of each router, or why there are none."""
    try:
        first = {label: read_run(group[0].folder) for label, group in runs.items()}
        return measured(first, session.backbone, session.data.test.input_ids, folder), None
    except BuddyError as error:
        return None, str(error)
    except Exception as error:  # a router may be third-party code
        return None, f"{type(error).__name__}: {reason(error)}"
