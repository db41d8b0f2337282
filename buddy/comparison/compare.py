"""`buddy compare`: any routers under one recipe, with several seeds, on several texts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from buddy.backbone.load import Backbone
from buddy.build import heals
from buddy.comparison.asked import RUNS, SEEDS, Asked, check
from buddy.comparison.contestants import Contestant, contestants
from buddy.comparison.domains import domains_of, read_domain
from buddy.comparison.output import write_all
from buddy.comparison.planned import Planned, base_of, check_reuse, finished_seeds, is_finished, planned, with_lent
from buddy.comparison.pool import side_by_side
from buddy.comparison.record import record_of
from buddy.comparison.timing import measured
from buddy.comparison.work import Start, Texts, Worker
from buddy.config import Recipe
from buddy.console import Bar, errors, status
from buddy.data.module import TextData
from buddy.engine.model import geometry_of
from buddy.errors import BuddyError, RunError
from buddy.fit import Session, prepare
from buddy.io import writing
from buddy.registry import build, check_names
from buddy.router import AnyRouter
from buddy.training.inputs import inputs_of

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
    check_names(base.optimizer.lr_by_router)
    recipes = {each: each.recipe(base) for each in contestants(asked.routers, asked.recipe)}
    domains = domains_of(asked.domains, asked.recipe)
    backbone, data = prepare(list(recipes.values()))
    with status("Reading text …"):
        texts = {domain: read_domain(domain, base, data) for domain in domains}
    runs = {each.label: _planned(asked, each, recipe, backbone) for each, recipe in recipes.items()}
    made_of = {recipe.router.name: inputs_of(recipe, backbone, data) for recipe in recipes.values()}
    windows = data.test.fingerprint
    check_reuse([run for group in runs.values() for run in group], made_of, windows)
    if asked.trained is not None and not asked.finished:
        runs = _with_lent(runs, asked.trained / RUNS, made_of, windows, backbone)
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
        record = record_of(
            command=asked.command,
            recipe=base,
            layers=backbone.num_layers,
            texts=texts,
            tasks=asked.tasks,
            runs=runs,
            failures=failures,
            speed=speed,
        )
        write_all(asked, record)
    for run, reason in failures:
        errors.print(f"Failed: {run.words}: {reason}", soft_wrap=True)
    if problem:
        errors.print(f"Failed: times were not measured: {problem}", soft_wrap=True)
    return len(failures) + bool(problem)


def _planned(asked: Asked, each: Contestant, recipe: Recipe, backbone: Backbone) -> list[Planned]:
    """The runs of one router.

    It has all the seeds where they matter: not for what is measured alone, nor where an option fixes the draws. The
    recipe's training has a part in the router, or in its adapter, or in neither.
    """
    router, folder = _router(recipe, backbone), asked.folder / RUNS / each.folder
    trained = router.trainable or heals(recipe, router)
    seeds = asked.seeds or SEEDS
    if asked.finished and asked.seeds is None:
        seeds = max([seed - recipe.seed + 1 for seed in finished_seeds(folder)] + [1])
    return planned(each.label, recipe, folder, seeds if trained or _draws(recipe, router) else 1, trained)


def _router(recipe: Recipe, backbone: Backbone) -> AnyRouter:
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
        router, inputs = _router(first.recipe, backbone), made_of[first.recipe.router.name]
        there = folder / first.folder.parent.name
        shared = [] if _draws(first.recipe, router) else finished_seeds(there)
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
    if asked.jobs == 1:
        return _one_by_one(Worker(session, asked.recipe_name, texts, asked.tasks), todo)
    failures: list[tuple[Planned, str]] = []
    threads = max(1, torch.get_num_threads() // asked.jobs)
    start = Start(todo[0].recipe, asked.recipe_name, tuple(texts), asked.tasks, threads)
    with Bar(f"Runs, {asked.jobs} at once", len(todo)) as bar:
        done = 0

        def on_done(run: Planned, reason: str | None) -> None:
            nonlocal done
            done += 1
            failures.extend([(run, reason)] if reason else [])
            bar.ended(run.words)
            bar.update(done, f"{'failed: ' if reason else ''}{run.words}")

        def on_line(run: Planned, words: str, passing: bool) -> None:
            if passing:
                bar.beside(run.words, words)
            else:
                errors.print(f"{run.words}: {words}", soft_wrap=True)

        side_by_side(start, todo, asked.jobs, on_done, on_line)
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
        return measured(runs, backbone, data.test.input_ids, asked.folder), None
    except BuddyError as error:
        return None, str(error)
    except Exception as error:  # a router may be anybody's code
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
