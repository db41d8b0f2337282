"""Where a run is kept, `<output>/<recipe>/<router>/`, and how it gets there whole or not at all.

While a run is made it lives in `<output>/<recipe>/.<router>.partial/`; an interrupted one goes on from there.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from buddy.errors import BuddyError, RunError
from buddy.files import checksum, read_json, write_json, write_text, writing
from buddy.recipe import load_recipe, to_yaml
from buddy.schema import Recipe

RECIPE, FACTS, ROUTER, METRICS = "recipe.yaml", "run.json", "router.safetensors", "metrics.json"
INPUTS = "inputs.json"


@dataclass(frozen=True)
class RunPlace:
    """Where the run of one router under one recipe is kept, and the steps by which it gets there."""

    final: Path

    @classmethod
    def of(cls, recipe: Recipe, recipe_name: str) -> "RunPlace":
        """`<output>/<recipe>/<router>`; signs that do not belong in a folder's name become hyphens."""
        return cls(Path(recipe.output) / folder_name(recipe_name) / folder_name(recipe.router.name))

    @property
    def partial(self) -> Path:
        """The folder in which the run is made."""
        return self._beside("partial")

    @property
    def aside(self) -> Path:
        """The old run, for the moment in which the new one takes its place."""
        return self._beside("old")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a run is made, so that two processes never write the same one; a kill frees it.

        Raises:
            RunError: another process holds it, or the place cannot be written.
        """
        lock, pid_file = FileLock(self._beside("lock")), self._beside("pid")
        with writing(self.final):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                pid = pid_file.read_text() if pid_file.exists() else "unknown"
                raise RunError(f"Process {pid} is making {self.final}; wait for it or stop it first.") from None
            pid_file.write_text(str(os.getpid()))
        try:
            yield
        finally:
            pid_file.unlink(missing_ok=True)
            lock.release()

    def open_partial(self, recipe: Recipe, inputs: Mapping[str, str] | None = None) -> Path:
        """The partial folder with recipe.yaml and inputs.json in it; call it with the lock held.

        What an interrupted run left there is kept when it was made of the same inputs and its recipe is the same but
        for `trainer.ckpt_path`, or that path points into it; otherwise the folder starts empty.

        Args:
            recipe: of the run.
            inputs: digests of what it is made of beside the recipe, by what they are of.

        Raises:
            RunError: something that is not a run stands in the way, or the place cannot be written.
        """
        self.recover()
        if self.final.exists() and not (self.final / FACTS).is_file():
            raise RunError(f"{self.final} is in the way and is not a run folder; move it or choose another output.")
        with writing(self.partial):
            same = inputs_in(self.partial) in (None, inputs)
            if self.partial.exists() and not (same and self._goes_on(recipe)):
                shutil.rmtree(self.partial)
            self.partial.mkdir(exist_ok=True)
        write_text(self.partial / RECIPE, to_yaml(recipe))
        if inputs is not None:
            write_json(self.partial / INPUTS, dict(inputs))
        return self.partial

    def publish(self) -> Path:
        """Put the partial folder in the final place; a kill at any point leaves the old run or the new one.

        run.json takes note of the finish and of checksums, by which `read_run` knows a cut or changed file.
        """
        sums = {name: checksum(self.partial / name) for name in (RECIPE, ROUTER)}
        facts = read_json(self.partial / FACTS)
        write_json(self.partial / FACTS, {**facts, "status": "finished", "checksums": sums})
        self.recover()
        with writing(self.final):
            if self.final.exists():
                self.final.rename(self.aside)
            self.partial.rename(self.final)
        self.recover()
        return self.final

    def recover(self) -> None:
        """Finish or take back what a kill inside `publish` left undone; call it with the lock held."""
        if self.final.exists():
            shutil.rmtree(self.aside, ignore_errors=True)
        elif self.aside.exists():
            with writing(self.final):
                self.aside.rename(self.final)

    def _goes_on(self, recipe: Recipe) -> bool:
        checkpoint = recipe.trainer.ckpt_path
        if checkpoint and Path(checkpoint).resolve().is_relative_to(self.partial.resolve()):
            return True
        try:
            return _without_checkpoint(load_recipe(self.partial / RECIPE)) == _without_checkpoint(recipe)
        except BuddyError:
            return False

    def _beside(self, ending: str) -> Path:
        return self.final.with_name(f".{self.final.name}.{ending}")


def inputs_in(folder: Path) -> dict[str, str] | None:
    """Digests of what the run in a folder is made of beside its recipe; None where that is not known."""
    try:
        return read_json(folder / INPUTS)
    except BuddyError:  # none, or cut
        return None


def _without_checkpoint(recipe: Recipe) -> Recipe:
    return replace(recipe, trainer=replace(recipe.trainer, ckpt_path=None))


def folder_name(name: str) -> str:
    """A name with hyphens for what does not belong in a folder's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".") or "-"
