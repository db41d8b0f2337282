"""What a run is made of beside its recipe: where one of these changed, it is another run."""

from __future__ import annotations

import hashlib
import inspect

from buddy.backbone import Backbone
from buddy.registry import load
from buddy.schema import Recipe
from buddy.training.data import TextData


def inputs_of(recipe: Recipe, backbone: Backbone, data: TextData) -> dict[str, str]:
    """Digests of the weights, the text and the file that the router's class is in, by what they are of."""
    code, more = _code(load(recipe.router.name)), data.train_fingerprint
    made_of = {"model": backbone.fingerprint, "text": data.fingerprint, "router's code": code}
    return made_of | ({"training text": more} if more else {})


def _code(router: type) -> str:
    try:
        source = inspect.getsource(inspect.getmodule(router))
    except (OSError, TypeError):  # made in a notebook, say
        return "unknown"
    return hashlib.sha256(source.encode()).hexdigest()[:16]
