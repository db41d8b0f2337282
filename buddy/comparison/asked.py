"""What a person asked to compare, and what of it cannot be, found before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from buddy.comparison.command import shown_command
from buddy.config import Recipe
from buddy.console import status
from buddy.errors import RecipeError, RunError
from buddy.io import check_output_path
from buddy.run import FACTS, folder_name

SEEDS = 3
RUNS = "runs"  # in the folder of a comparison


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
    if asked.jobs < 1:
        raise RecipeError(f"--jobs is {asked.jobs}; give 1 or more.")
    if asked.recipe.trainer.devices * asked.recipe.trainer.nodes > 1:
        raise RecipeError(
            "buddy compare trains each router on one device; set trainer.devices=1 and trainer.nodes=1, and --jobs for "
            "several at once."
        )
    if asked.trained is not None:
        _check_lender(asked)
    if asked.recipe.trainer.ckpt_path:
        raise RecipeError("buddy compare goes on by itself from what it left; leave trainer.ckpt_path out.")
    if asked.folder.exists() and not asked.folder.is_dir():
        raise RunError(f"{asked.folder} is a file; name a folder as --out.")
    if (asked.folder / FACTS).exists():
        raise RunError(f"{asked.folder} is a run folder; name another folder as --out.")
    if asked.markdown:
        check_output_path(asked.markdown)
    if asked.tasks.names:
        from buddy.evaluation.task_source import hushed, load_tasks, require_lm_eval

        require_lm_eval()
        with hushed(), status("Reading tasks …"):
            load_tasks(asked.tasks.names, asked.tasks.data, asked.tasks.path)


def _check_lender(asked: Asked) -> None:
    adapter, trained = asked.recipe.adapter, asked.trained
    if adapter is None:
        raise RecipeError("--trained lends routers to be healed; give adapter.steps=… or another key of adapter.")
    if adapter.joint:
        raise RecipeError("adapter.joint=true trains the routers too; leave --trained out, or set it to false.")
    if not os.path.isdir(trained / RUNS):  # which answers for names that are too long
        raise RunError(f"{trained} is not the folder of a comparison; name the --out of one as --trained.")
    if os.path.realpath(asked.folder) == os.path.realpath(trained):
        raise RunError(f"{trained} holds the unhealed runs, which stay; give another --out for the healed ones.")
