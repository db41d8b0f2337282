"""Several routers under one recipe: `buddy fit` with its rivals, and `buddy compare` with seeds, texts and tasks.

Both make the same run folders `<folder>/<router>/seed-N` and the same tables. `buddy fit` has one seed and the recipe's
own text, can run in several processes, and makes a run anew when its recipe has changed; `buddy compare` refuses such a
run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from buddy import console, distributed
from buddy.builders.model import build_router, with_dtype
from buddy.builders.training import healing_steps, ignored_keys
from buddy.config import with_router
from buddy.console import Bar, clock, status, stderr
from buddy.data.text import named_sources
from buddy.data.windows import Windows
from buddy.errors import BuddyError, RecipeError, RunError, described
from buddy.evaluation import bench
from buddy.evaluation.figures import CAPTIONS, TENSORBOARD
from buddy.evaluation.record import CSV, JSON, MARKDOWN, collect, read_record, text_entry, write_results
from buddy.executors import require_ray, run_in_processes, run_on_ray
from buddy.fit import Session
from buddy.io import check_output_path, locked, remove_parts, writing
from buddy.provenance import TRAINING_KEYS, check_fixed
from buddy.router import AnyRouter
from buddy.run import (
    RunFolder,
    RunSpec,
    complete_seeds,
    folder_name,
    label_folder,
    read_run,
    recipe_inputs,
    warn_of_changed_code,
)
from buddy.run_files import FACTS
from buddy.schema import PredictorSection, Recipe, Rival
from buddy.worker import EvaluationText, Tasks, Worker, read_windows, run_in_worker, texts_of

SEEDS = 3
LOCK_SECONDS = 10.0  # that `fit` waits for another to write its tables
PREDICTOR_KEYS = "predictor."  # beginning of the recipe keys that change nothing in a run of a comparison
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
        trained: the folder of a comparison whose routers are taken, so that only adapter and bridges are trained.
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

    Rivals come first, and the recipe's own router, whose training is as a rule the longest, last. A complete run of the
    same recipe and inputs is reused; one of another recipe is made anew and replaced when the new one is complete.

    Args:
        recipe: of the runs.
        recipe_name: names their folder.
        command: shown in the results.

    Raises:
        BuddyError: the user can correct the cause; complete runs stay.
        KeyboardInterrupt: stopped after a step; the same call resumes.
    """
    first, folder = distributed.is_global_zero(), Path(recipe.output) / folder_name(recipe_name)
    if first:
        _check_results(folder, "set another output")
    if first and folder.exists():
        with _locked(folder):  # a comparison that works in the folder would keep the tables from being written
            pass
    console.stderr.quiet = console.stdout.quiet = not first
    recipe = with_dtype(recipe)
    base, own = _common_recipe(recipe), Rival(recipe.router.name)
    own_recipe = replace(base, predictor=recipe.predictor, ckpt_path=recipe.ckpt_path)
    recipes = {each.label: with_router(base, each) for each in recipe.rivals if each != own} | {own.label: own_recipe}
    specs = [
        RunSpec(label, of, recipe_name, RunFolder.of(folder, label, of.seed).path) for label, of in recipes.items()
    ]
    session = Session.launch(specs, recipe)
    with distributed.lost_peers_reported():
        for number, spec in enumerate(specs, start=1):
            differing = session.differences(spec) if first and spec.run_folder.is_complete else []
            complete = distributed.broadcast(first and spec.run_folder.is_complete and not differing)
            if len(specs) > 1 or complete:
                note = ", complete: reused" if complete else ""
                stderr.print(f"Router {number} of {len(specs)}: {spec.label}{note}")
            if differing:
                why = "; ".join(differing)
                stderr.print(f"The new run replaces {spec.folder} when it is complete ({why}).")
            if complete and first:
                warn_of_changed_code(spec.folder, session.digests(spec.recipe))
            elif not complete:
                (session.fit if first else session.follow)(spec)
    if first:
        (text,) = texts_of(None, recipe)
        done = {spec.label: [spec.folder] for spec in (specs[-1], *specs)}  # the recipe's own router first
        record = _collected(done, session, base, {text: session.data.evaluated}, command=command)
        with _locked(folder, LOCK_SECONDS):
            write_results(record, folder)


def compare(config: CompareConfig) -> int:
    """Fit or reuse every run, evaluate all, and show them side by side.

    Returns:
        The number of failures. They are reported, and all other runs are complete.

    Raises:
        BuddyError: a mistake that was found before any work.
        KeyboardInterrupt: stopped; the same call resumes.
    """
    config = check(config)
    base = _common_recipe(config.recipe)
    if config.recipe.predictor.name is not None:
        stderr.print("A comparison fits no budget predictor: all routers have the recipe's budgets.")
    rivals = config.routers or list(dict.fromkeys([Rival(config.recipe.router.name), *config.recipe.rivals]))
    recipes = {each.label: with_router(base, each) for each in rivals}
    texts = texts_of(config.texts, config.recipe)
    _refuse_other_recipes(config.folder, recipes)
    session = Session.prepare(list(recipes.values()), list(recipes))
    check_fixed(config.recipe, rivals, session.digests(config.recipe))
    specs = [spec for label, of in recipes.items() for spec in _specs(config, label, of, session)]
    _refuse_others(specs, session)
    with status("Reading text …"):
        windows = {text: read_windows(text, base, session.data) for text in texts}
    for spec in specs:
        warn_of_changed_code(spec.folder, session.digests(spec.recipe))
    if config.finished:
        specs = _complete_ones(specs, config.folder)
    elif config.trained is not None:
        specs = _reusing(specs, config.trained, session)
    with _locked(config.folder):
        failures = _work(config, specs, session, windows)
        failed = {spec.folder for spec, _ in failures}
        done: dict[str, list[Path]] = {}
        for spec in specs:
            if spec.folder not in failed:
                done.setdefault(spec.label, []).append(spec.folder)
        _refuse_others([spec for spec in specs if spec.folder not in failed], session)  # `buddy fit` may replace a run
        speed, problem = _times(done, session, config.folder) if done and config.speed else (None, None)
        if done:
            record = _collected(
                done,
                session,
                base,
                windows,
                command=config.command,
                tasks=config.tasks.names,
                task_limit=config.tasks.limit,
                speed=speed,
                failures=[(spec.label, spec.recipe.seed, why) for spec, why in failures],
            )
            write_results(record, config.folder, config.markdown)
    for spec, why in failures:
        stderr.print(f"Failed: {spec.title}: {why}")
    if problem:
        stderr.print(f"Failed: times were not measured: {problem}")
    return len(failures) + bool(problem)


def _collected(
    runs: Mapping[str, Sequence[Path]],
    session: Session,
    base: Recipe,
    windows: Mapping[EvaluationText, Windows],
    **more: Any,
) -> dict[str, Any]:
    """The content of comparison.json for runs of a session, evaluated on these windows; `more` as for `collect`."""
    return collect(
        runs,
        recipe=base,
        digests=session.digests(base),
        layers=session.backbone.num_layers,
        calibration_windows=len(session.data.calibration),
        texts=[text_entry(text.label, text.source, found, own=text.own) for text, found in windows.items()],
        **more,
    )


def check(config: CompareConfig) -> CompareConfig:
    """Find mistakes that show without the model.

    Returns:
        The comparison, with the tasks of a group or tag one by one, and `backbone.dtype` resolved.

    Raises:
        BuddyError: there is a mistake.
    """
    seeds, trainer = config.seeds or SEEDS, config.recipe.trainer
    if config.recipe.seed + seeds > 2**32:
        raise RecipeError(f"seed is {config.recipe.seed}, too large for {seeds} seeds from it on; set it smaller.")
    if trainer["devices"] != 1 or trainer["num_nodes"] != 1:
        raise RecipeError(
            "buddy compare trains each router on one device; set trainer.devices=1 and trainer.num_nodes=1, and --jobs "
            "for several at once."
        )
    if config.backend == "ray":
        require_ray()
    if config.recipe.ckpt_path:
        raise RecipeError("buddy compare resumes by itself; leave ckpt_path out.")
    if config.trained is not None:
        _check_trained(config)
    if os.path.isfile(config.folder) or os.path.exists(config.folder / FACTS):
        raise RunError(f"{config.folder} is a file or a run folder; name another folder as --out.")
    if config.markdown:
        texts = named_sources(config.texts, config.recipe.data.source).values() if config.texts else ()
        folders = filter(None, [config.tasks.data, config.tasks.path, config.trained])
        own = (path for path in config.folder.rglob("*") if path != config.folder / MARKDOWN and path.is_file())
        check_output_path(config.markdown, *recipe_inputs(config.recipe), *texts, *folders, *own)
    _check_results(config.folder, "name another folder as --out")
    if config.tasks.names:
        from buddy.evaluation.task_data import items_digest, load_tasks, quiet_lm_eval, require_lm_eval

        require_lm_eval()
        with quiet_lm_eval(), status("Reading tasks …"):
            loaded = load_tasks(config.tasks.names, config.tasks.data, config.tasks.path)
            items = {name: items_digest(task) for name, task in loaded.items()}
        config = replace(config, tasks=replace(config.tasks, names=tuple(loaded), items=items))
    return replace(config, recipe=with_dtype(config.recipe))


def _check_results(folder: Path, advice: str) -> None:
    """Raises RunError if the folder cannot be written, or has files of the user's own where a comparison writes."""
    with writing(folder), suppress(FileNotFoundError, NotADirectoryError):
        os.stat(folder)  # fails where the name is too long, or a folder above may not be entered
    names = (JSON, CSV, MARKDOWN, TENSORBOARD, bench.FILE, *(f"{name}.png" for name in CAPTIONS))
    foreign = [name for name in names if os.path.exists(folder / name)]
    if not foreign or any(folder.glob("*/seed-*")):
        return
    with suppress(BuddyError):
        read_record(folder / JSON)
        return
    raise RunError(f"{folder} has {foreign[0]}, which no comparison wrote; {advice}.")


def _check_trained(config: CompareConfig) -> None:
    recipe, trained = config.recipe, config.trained
    if config.finished:
        raise RecipeError("--finished fits nothing, so it heals nothing; leave out --finished or --trained.")
    if recipe.adapter is None and not (recipe.bridge and recipe.bridge.steps):
        raise RecipeError("--trained heals trained routers; give bridge.steps=…, adapter.steps=… or both.")
    for name, section in (("adapter", recipe.adapter), ("bridge", recipe.bridge)):
        if section and section.joint:
            raise RecipeError(f"{name}.joint=true trains the routers again; leave --trained out, or set it to false.")
    if not os.path.isdir(trained):  # os.path answers for names that are too long
        raise RunError(f"{trained} is not the folder of a comparison; name the --out of one as --trained.")
    if os.path.realpath(config.folder) == os.path.realpath(trained):
        raise RunError(f"{trained} holds the unhealed runs, which stay; give another --out for the healed ones.")


# Runs


def _common_recipe(recipe: Recipe) -> Recipe:
    """What the recipes of all runs have in common: the seed of the data is fixed, so that `seed` is the router's alone.

    The budget predictor and the checkpoint belong to the recipe's own router.
    """
    data = replace(recipe.data, seed=recipe.data_seed)
    return replace(recipe, data=data, rivals=[], predictor=PredictorSection(), ckpt_path=None)


def _specs(config: CompareConfig, label: str, recipe: Recipe, session: Session) -> list[RunSpec]:
    """The runs of one router: one for each seed if the router, its adapter or its bridges depend on it, else one."""
    router, folder = build_router(recipe, session.backbone), config.folder
    seeded = healing_steps(recipe, router) > 0 or _depends_on_seed(recipe, router)
    seeds = [*range(recipe.seed, recipe.seed + ((config.seeds or SEEDS) if seeded else 1))]
    if seeded and config.finished and config.seeds is None:
        complete = complete_seeds(folder / label_folder(label))
        seeds = [seed for seed in complete if seed >= recipe.seed] or [recipe.seed]
    return [
        RunSpec(
            label,
            replace(recipe, seed=seed),
            config.recipe_name,
            RunFolder.of(folder, label, seed).path,
            ignored_keys=(PREDICTOR_KEYS,),
        )
        for seed in seeds
    ]


def _depends_on_seed(recipe: Recipe, router: AnyRouter) -> bool:
    """Whether the router, apart from its adapter and bridges, differs between seeds."""
    return router.trainable or (router.seeded and recipe.router.options.get("seed") is None)


def _refuse_other_recipes(folder: Path, recipes: Mapping[str, Recipe]) -> None:
    """Raises RunError if the folder holds runs of other recipes, as far as it shows without model and text."""
    ignore = (PREDICTOR_KEYS, *TRAINING_KEYS, "seed", "data.seed")
    paths = {path: of for label, of in recipes.items() for path in (folder / label_folder(label)).glob("seed-*")}
    _refuse({path: RunFolder(path).differences(of, {}, ignore) for path, of in paths.items()})


def _refuse_others(specs: Sequence[RunSpec], session: Session) -> None:
    """Raises RunError if folders hold runs of other recipes or inputs, or something else."""
    for spec in specs:
        spec.run_folder.check_free()
    _refuse({spec.folder: session.differences(spec) for spec in specs})


def _refuse(differences: Mapping[Path, Sequence[str]]) -> None:
    wrong = {folder: found for folder, found in differences.items() if found}
    if wrong:
        folder, *others = wrong
        reasons = "; ".join(dict.fromkeys(each for found in wrong.values() for each in found))
        more = f" and {len(others)} more were" if others else " was"
        raise RunError(
            f"{folder}{more} made otherwise ({reasons}) and cannot be in this comparison; give another --out, or "
            "delete that folder."
        )


def _complete_ones(specs: Sequence[RunSpec], folder: Path) -> list[RunSpec]:
    """The runs that are complete; routers without one are reported and left out."""
    found = [spec for spec in specs if spec.run_folder.is_complete]
    if not found:
        raise RunError(f"No run in {folder} is complete yet; leave --finished out to fit them.")
    labels = {spec.label for spec in found}
    if missing := dict.fromkeys(spec.label for spec in specs if spec.label not in labels):
        stderr.print(f"Not complete, and left out: {', '.join(missing)}.")
    return found


def _reusing(specs: Sequence[RunSpec], folder: Path, session: Session) -> list[RunSpec]:
    """The runs, each with the trained router of its counterpart in another comparison; those without one are reported.

    A router that does not depend on the seed was fitted once, and serves all seeds.

    Raises:
        RunError: there is no counterpart at all, or one was made otherwise.
    """
    specs = [_reuse(spec, folder, session) for spec in specs]
    if not any(spec.reuse_from for spec in specs):
        raise RunError(f"{folder} holds a complete run of none of these routers and seeds; leave --trained out.")
    alone = [spec.title for spec in specs if spec.reuse_from is None and not spec.run_folder.is_complete]
    if alone:
        stderr.print(f"Fitted here, because {folder} has no complete run: {'; '.join(alone)}.")
    return specs


def _reuse(spec: RunSpec, folder: Path, session: Session) -> RunSpec:
    router, there = build_router(spec.recipe, session.backbone), folder / spec.folder.parent.name
    seeds = [spec.recipe.seed] if _depends_on_seed(spec.recipe, router) else complete_seeds(there)
    if not seeds or not (other := RunFolder(there / f"seed-{seeds[0]}")).is_complete:
        return spec
    if read_run(other.path).recipe.adapter is not None:
        raise RunError(f"{other.path} was healed itself; name the comparison that it came from as --trained.")
    warn_of_changed_code(other.path, session.digests(spec.recipe))
    recipe = replace(spec.recipe, seed=seeds[0])
    ignored = ("adapter", "bridge.steps", "bridge.lr", PREDICTOR_KEYS, *ignored_keys(recipe, router))
    ignored += () if router.trainable else TRAINING_KEYS
    if reasons := other.differences(recipe, session.digests(recipe), ignore=ignored):
        raise RunError(
            f"{other.path} was made otherwise ({'; '.join(reasons)}), so its router cannot be healed here; leave "
            "--trained out."
        )
    return replace(spec, reuse_from=other.path)


@contextmanager
def _locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Held while a comparison works in its folder; `patience` in seconds is how long it waits for another one."""
    busy = f"Another process compares into {folder}; wait for it, or name another folder for the output."
    with locked(folder / ".lock", busy, patience):
        remove_parts(folder, recursive=False)
        yield


# Work


def _work(
    config: CompareConfig,
    specs: Sequence[RunSpec],
    session: Session,
    windows: Mapping[EvaluationText, Windows],
) -> list[tuple[RunSpec, str]]:
    """Do all runs; those that failed, and why."""
    failures: list[tuple[RunSpec, str]] = []

    def on_done(spec: RunSpec, outcome: Any) -> None:
        if isinstance(outcome, KeyboardInterrupt):
            outcome = "its process was stopped; the same command resumes it"
        elif isinstance(outcome, Exception) and not isinstance(outcome, BuddyError):
            outcome = described(outcome)
        failures.extend([] if outcome is None else [(spec, str(outcome))])

    if config.backend == "loky" and config.jobs == 1:
        worker, spent = Worker(session, windows, config.tasks), list[float]()
        for number, spec in enumerate(specs, start=1):
            stderr.print(f"Run {number} of {len(specs)}: {spec.title}{_left(spent, len(specs))}")
            start = time.monotonic()
            on_done(spec, worker.run(spec))
            spent.append(time.monotonic() - start)
        return failures
    threads = max(1, torch.get_num_threads() // config.jobs)
    ray = config.backend == "ray"
    gpus = config.recipe.trainer["accelerator"] != "cpu"
    run_all = partial(run_on_ray, gpus=gpus) if ray else partial(run_in_processes, jobs=config.jobs)
    with Bar(f"Runs, {'on Ray' if ray else f'{config.jobs} at once'}", len(specs)) as bar:
        done = count(1)

        def show(spec: RunSpec, outcome: Any) -> None:
            on_done(spec, outcome)
            bar.update(next(done), f"{'failed: ' if outcome else ''}{spec.title}")

        stderr.print(f"Each run writes what it does to {config.folder}/<router>/seed-N.log.")
        run_all(partial(run_in_worker, tuple(windows), config.tasks), specs, show, threads=threads)
    return failures


def _left(spent: Sequence[float], total: int) -> str:
    """The time spent on runs and the time that is left, as messages show them; from the seconds of each run so far."""
    worked = [seconds for seconds in spent if seconds >= ALREADY_COMPLETE]
    if not worked:
        return ""
    remaining = (total - len(spent)) * sum(worked) / len(worked)
    return f" ({clock(sum(spent))} elapsed, about {clock(remaining)} left)"


def _times(
    runs: Mapping[str, Sequence[Path]], session: Session, folder: Path
) -> tuple[dict[str, Any] | None, str | None]:
    """Times of the first run of each router, or why there are none."""
    try:
        first = {label: read_run(group[0]) for label, group in runs.items()}
        return bench.measured(first, session.backbone, session.data.evaluated.input_ids, folder), None
    except BuddyError as error:
        return None, str(error)
    except Exception as error:  # a router may be third-party code
        return None, described(error)
