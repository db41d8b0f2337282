"""All checks of a router: for a test, and for `buddy routers check`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from buddy.backbone.load import Backbone, load_backbone
from buddy.config import override
from buddy.console import status, track
from buddy.errors import RegistryError
from buddy.router import AnyRouter
from buddy.schema import Recipe
from buddy.testing import behaviour, outputs
from buddy.testing.check import Check, Failed, Result
from buddy.testing.subject import Subject

CHECKS: tuple[Check, ...] = tuple(
    dict.fromkeys(each for module in (outputs, behaviour) for each in vars(module).values() if isinstance(each, Check))
)


def check_router(
    router: type[AnyRouter] | str,
    *,
    options: Mapping[str, Any] | None = None,
    backbone: Backbone | None = None,
) -> list[Result]:
    """All checks of one router; all failures are raised together.

    Args:
        router: a class, an installed name, or "my_module:MyRouter".
        options: keyword arguments of the class, as in `router.options` of a recipe.
        backbone: a model in float32 with no router attached; by default a tiny random one.

    Raises:
        Failed: an AssertionError with a sentence for each check that failed, which says what to change.
        RegistryError: no such router, or its options do not fit.
    """
    subject = Subject(router, options, backbone)
    results = [check.examine(subject) for check in CHECKS]
    failed = [result for result in results if result.state == "failed"]
    if failed:
        lines = "".join(f"\n- {result.check}: {result.message}" for result in failed)
        raise Failed(f"{subject.name} fails {len(failed)} of {len(CHECKS)} checks:{lines}") from failed[0].error
    return results


def check_named(name: str, *, backbone: str | None = None, options: Sequence[str] = ()) -> list[Result]:
    """All checks of a router by name, with a progress bar.

    Args:
        name: an installed router, or "my_module:MyRouter".
        backbone: as in `backbone.name` of a recipe; a tiny random model by default.
        options: "key=value" texts, the values as in a recipe.

    Raises:
        BuddyError: no such router or backbone, or options that do not fit.
    """
    for text in options:
        if not re.fullmatch(r"[A-Za-z_]\w*=.+", text, re.DOTALL):
            raise RegistryError(f"{text!r} is not an option; write --options KEY=VALUE, as in --options hidden=64.")
    overrides = [f"router.name={json.dumps(name)}", *(f"router.options.{text}" for text in options)]
    router = override(Recipe(), overrides, f"--options of {name}").router
    subject = Subject(name, router.options)  # on the tiny model first, which finds mistakes quickly
    if backbone is not None:
        with status(f"Loading {backbone} …"):
            subject = Subject(name, router.options, load_backbone(backbone, "float32"))
    return [check.examine(subject) for check in track(CHECKS, f"Checking {name}")]
