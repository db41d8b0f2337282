"""`buddy routers check`: all checks of a router by name, with progress."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from buddy.backbone.load import load_backbone
from buddy.config import Recipe, override
from buddy.console import status, track
from buddy.errors import RegistryError
from buddy.testing import CHECKS
from buddy.testing.check import Result
from buddy.testing.subject import Subject


def check_named(name: str, *, backbone: str | None = None, options: Sequence[str] = ()) -> list[Result]:
    """How each check of a router ended.

    Args:
        name: an installed router, or "my_module:MyRouter".
        backbone: as in `backbone.name` of a recipe; a tiny random model by default.
        options: "key=value" texts, the values as in a recipe.

    Raises:
        BuddyError: no such router or backbone, or options that do not fit.
    """
    subject = Subject(name, router_options(name, options))  # on the tiny model first: it finds mistakes at once
    if backbone is not None:
        with status(f"Loading {backbone} …"):
            subject = Subject(name, subject.options, load_backbone(backbone, "float32"))
    return [check.examine(subject) for check in track(CHECKS, f"Checking {name}")]


def router_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """The router's options of "key=value" texts.

    Raises:
        RegistryError: a text of another form.
        RecipeError: a value that cannot be read.
    """
    for text in texts:
        if not re.fullmatch(r"[A-Za-z_]\w*=.+", text, re.DOTALL):
            raise RegistryError(f"{text!r} is no option; write --options KEY=VALUE, as in --options hidden=64.")
    overrides = [f"router.name={json.dumps(name)}", *(f"router.options.{text}" for text in texts)]
    return override(Recipe(), overrides, f"--options of {name}").router.options
