"""A budget predictor in a run folder: predictor.safetensors, and predictor.json with what it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from buddy.errors import RunError
from buddy.io import damaged, load_tensors, read_json, save_tensors, write_json
from buddy.predictor.features import size_of
from buddy.predictor.grpo import BudgetPolicy
from buddy.predictor.regress import CurvePredictor
from buddy.router import Geometry
from buddy.run import PREDICTOR, PREDICTOR_FACTS

AnyPredictor = CurvePredictor | BudgetPolicy


def save_predictor(folder: Path, predictor: AnyPredictor, options: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write both files.

    Args:
        folder: of the run.
        predictor: fitted.
        options: keyword arguments that it was made with.
        facts: what else people may want to know.
    """
    said = {"name": predictor.name, "layers": list(predictor.arms), "options": dict(options), **facts}
    save_tensors(folder / PREDICTOR, predictor.state_dict(), {"format": "pt"})
    write_json(folder / PREDICTOR_FACTS, said)


def load_predictor(folder: Path, geometry: Geometry) -> AnyPredictor | None:
    """The predictor of a run, None where it has none.

    Raises:
        RunError: a file is missing or damaged, or it was made for another model.
    """
    if not (folder / PREDICTOR_FACTS).exists() and not (folder / PREDICTOR).exists():
        return None
    facts = read_json(folder / PREDICTOR_FACTS)
    try:
        made = make_predictor(facts["name"], geometry, facts["layers"], facts["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / PREDICTOR_FACTS, f"it does not describe a predictor: {error}") from error
    try:
        made.load_state_dict(load_tensors(folder / PREDICTOR))
    except RuntimeError as error:
        raise RunError(
            f"The budget predictor saved in {folder} does not fit this model; make the run again with `buddy fit`."
        ) from error
    return made.eval().requires_grad_(False)


def make_predictor(name: str, geometry: Geometry, arms: list[int], options: Mapping[str, Any]) -> AnyPredictor:
    """A predictor that is not fitted yet; ValueError for an unknown name."""
    kinds: dict[str, type[nn.Module]] = {kind.name: kind for kind in (CurvePredictor, BudgetPolicy)}
    if name not in kinds:
        raise ValueError(f"no predictor is named {name!r}")
    return kinds[name](size_of(geometry), arms, **options)
