"""What a fit has finished so far, so that the same call, repeated after a kill, does not do it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from buddy.config import Recipe
from buddy.errors import BuddyError
from buddy.io import read_json, write_json
from buddy.run import RunPlace, inputs_in, read_metrics, read_run
from buddy.scoring.perplexity import Scores, scores_of


class Ledger:
    """Names of the routers that are finished, in a hidden file beside the runs until the whole fit is.

    Args:
        place: of the recipe's own router.
    """

    def __init__(self, place: RunPlace) -> None:
        self._path = place.final.with_name(f".{place.final.name}.fit")
        try:
            self._done = [name for name in read_json(self._path)["done"] if isinstance(name, str)]
        except (BuddyError, LookupError, TypeError):  # nothing was interrupted, or nobody can tell
            self._done = []

    def scores(self, recipe: Recipe, place: RunPlace, inputs: Mapping[str, str]) -> list[Scores] | None:
        """The results of a router that is finished; None where it is not, or was made of something else."""
        if recipe.router.name not in self._done:
            return None
        try:
            run = read_run(place.final)
            if _named(run.recipe) != _named(recipe) or inputs_in(place.final) != inputs:
                return None
            return scores_of(read_metrics(place.final))
        except (BuddyError, LookupError, TypeError, ValueError):
            return None

    def note(self, name: str) -> None:
        """A router is finished.

        Raises:
            RunError: the place cannot be written.
        """
        if name not in self._done:
            self._done.append(name)
            write_json(self._path, {"done": self._done})

    def close(self) -> None:
        """The whole fit is finished; the next call begins anew."""
        self._path.unlink(missing_ok=True)


def _named(recipe: Recipe) -> Recipe:
    """Without what changes from one beginning of a fit to the next."""
    return replace(recipe, ckpt_path=None)
